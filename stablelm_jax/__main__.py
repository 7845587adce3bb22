"""`stablelm VERB ...`, the same as `python -m stablelm_jax.VERB ...`.

Nothing but the verb asked for is imported: `--help` and a mistyped verb answer at once.
"""

from __future__ import annotations

import difflib
import runpy
import sys
from collections.abc import Sequence

from stablelm_jax import __version__, configs_folder

VERBS = {
    "prepare": "documents into token shards, a held-out split and a manifest",
    "plan": "what a run needs: memory, communication, time, cost, without the machine",
    "train": "pretrain; goes on by itself where the run's folder holds a checkpoint",
    "runs": "the tree of runs and their branches below a folder, their curves in one picture",
    "inspect_data": "the documents that a step was made of",
    "evaluate": "held-out loss of a checkpoint, or the benchmarks of lm-eval",
    "generate": "text from a checkpoint",
    "convert": "checkpoints from and to Hugging Face and GGUF, each checked as it is written",
    "drill": "kill and stop a run in every phase; is its end the undisturbed one, bit for bit?",
}
BAD_ARGUMENTS = 2  # exit code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb, which leaves with an exit code of its own; else returns the exit code.

    `argv`: what follows the program's name.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0] if arguments else None
    if verb in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if verb == "--version":
        print(f"stablelm_jax {__version__}")
        return 0
    if verb not in VERBS:
        print(_unknown(verb), file=sys.stderr)
        return BAD_ARGUMENTS
    sys.argv = [f"stablelm {verb}", *arguments[1:]]
    # As the main module: absl's --help lists the flags of that one.
    runpy.run_module(f"stablelm_jax.{verb}", run_name="__main__", alter_sys=True)
    return 0


def _usage() -> str:
    verbs = "\n".join(f"  {verb:<14}{purpose}" for verb, purpose in VERBS.items())
    return (
        "usage: stablelm VERB ...\n\n"
        f"{verbs}\n\n"
        "stablelm VERB --help says more of one.\n"
        f"The configs that come along: {configs_folder()}"
    )


def _unknown(verb: str | None) -> str:
    known = f"the verbs are {', '.join(VERBS)}"
    if verb is None:
        return f"stablelm: which verb? {known}; stablelm --help says more"
    near = difflib.get_close_matches(verb, VERBS, n=1)
    question = f"did you mean {near[0]!r}? " if near else ""
    return f"stablelm: there is no verb {verb!r}; {question}{known}"


if __name__ == "__main__":
    sys.exit(main())
