"""Whether a launch script may start a training again: not for ever without a newer checkpoint.

    python launch/restarts.py WORKDIR LAUNCH NUMBER

is called before start NUMBER (from 0) of LAUNCH, which is one job or one call of a script. What it
has to remember is in WORKDIR/restarts.json, where the next start finds it on another machine. Exit
codes: 0 start it; 1 too many starts in a row have left no newer checkpoint.
"""

import argparse
import json
import os
import sys

from stablelm_jax.checkpoint.names import (
    checkpoint_name,
    checkpoint_path,
    entries,
    finished_steps,
)

# One may be a machine that failed or the end of a job's time; five in a row are a fault that stays.
MAX_STARTS = int(os.environ.get("STABLELM_STARTS_WITHOUT_PROGRESS") or 5)


def may_start(workdir: str, launch: str, number: int) -> bool:
    """Whether fewer than MAX_STARTS starts before this one were in vain; says what it found.

    To ask twice about one start changes nothing.
    """
    folder = checkpoint_path(workdir)
    steps = finished_steps(folder / "checkpoints")
    newest = steps[-1] if steps else -1
    if number == 0 and not steps:
        return True  # nothing is written: this may be a folder that the training refuses
    note = folder / "restarts.json"
    since = number if steps else 0  # the first start that found the newest checkpoint
    before = _read(note)
    if before.get("launch") == launch and newest <= before["newest"]:
        since = before["since"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state = json.dumps({"launch": launch, "newest": newest, "since": since})
        note.write_text(state + "\n", encoding="utf-8")
    except OSError as error:
        since = 0  # every start counts where nothing can be remembered
        print(f"{note} cannot be written: {error}", file=sys.stderr)
    found = f"newest checkpoint: {checkpoint_name(newest)}" if steps else "no checkpoint so far"
    vain = number - since
    if vain < MAX_STARTS:
        print(f"{workdir}: {found}; starts in vain since then: {vain} of {MAX_STARTS}")
        return True
    print(
        f"error: {workdir}: {vain} starts in a row have left no newer checkpoint ({found}). The "
        "log says how they ended; once the reason is gone, launch it again: it goes on by itself",
        file=sys.stderr,
    )
    return False


def _read(note) -> dict:
    """What an earlier call wrote; nothing where that is not there, or not whole."""
    try:
        before = (
            json.loads(note.read_text(encoding="utf-8")) if note in entries(note.parent) else {}
        )
        return before if {"launch", "newest", "since"} <= set(before) else {}
    except (OSError, ValueError, TypeError):
        return {}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workdir", metavar="WORKDIR")
    parser.add_argument("launch", metavar="LAUNCH")
    parser.add_argument("number", metavar="NUMBER", type=int)
    given = parser.parse_args(argv)
    try:
        return 0 if may_start(given.workdir, given.launch, given.number) else 1
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
