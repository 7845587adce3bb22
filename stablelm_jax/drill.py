"""`drill --config F --workdir D`: does this run survive being killed and stopped, bit for bit?

Trains F as a process of its own: once undisturbed, then disturbed: killed, or asked to stop, at a
random moment of each phase, and started again until it is done. Every line of metrics, the final
parameters, moments and ledger must be those of the undisturbed run.

    python -m stablelm_jax.drill --config configs/smoke.py --config.data.root=runs/smoke/data \\
        --config.training.num_steps=40 --workdir runs/drill --kills 10 --signals 10 --twice 2

The training knows nothing of it: the drill sees in the run folder what goes on. So the fewer steps
write a line of metrics (`training.log_every`), the fewer phases can be told apart.

Exit codes: 0 all is as it should be; 1 it is not, the first difference comes last; 2 bad config or
arguments; 130 Ctrl-C.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from stablelm_jax import config as config_lib
from stablelm_jax.drilling.phases import PHASES


def main(argv: Sequence[str] | None = None) -> None:
    """Leaves with one of the exit codes above. `argv`: the program's name, then its flags."""
    config_lib.define_flags(argv)
    flags.DEFINE_string("workdir", None, "The drill's folder on this machine.", required=True)
    flags.DEFINE_integer("kills", 10, "How many SIGKILLs.", lower_bound=0)
    flags.DEFINE_integer("signals", 10, "How many SIGTERMs.", lower_bound=0)
    flags.DEFINE_integer("twice", 2, "How many times two SIGTERMs.", lower_bound=0)
    flags.DEFINE_integer("processes", 1, "Processes of each training.", lower_bound=1)
    flags.DEFINE_integer("devices", None, "CPU devices of each process.", lower_bound=1)
    flags.DEFINE_integer("jobs", 1, "Disturbed trainings at a time.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "What is drawn depends on it.")
    flags.DEFINE_list("phases", [], f"Which to hit, of {','.join(PHASES)}; default: all.")
    config_lib.run(lambda rest: _drill(flags.FLAGS), argv)


def _drill(given: Any) -> int:
    config = config_lib.config_from_flags()
    for phase in given.phases:
        if phase not in PHASES:
            raise config_lib.ConfigError(f"--phases: no {phase!r}; there are {', '.join(PHASES)}")
    if "://" in given.workdir:
        raise config_lib.ConfigError(f"--workdir={given.workdir}: give a folder of this machine")
    from stablelm_jax.drilling.rounds import KILL, TERM, TWICE, Drill

    # Left by an exception, the drill ends the trainings under way.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    folder = Path(given.workdir).resolve()
    drill = Drill(folder, config, given.processes, given.devices, given.seed)
    try:
        drill.train_undisturbed()
        amounts = {KILL: given.kills, TERM: given.signals, TWICE: given.twice}
        drill.run(amounts, given.phases, given.jobs)
    except KeyboardInterrupt:
        print("interrupted; run the same command again", file=sys.stderr)
        return 130  # as shells say it
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return conclude(drill)


def conclude(drill: Any) -> int:
    """Prints the table, writes drill.json into the drill's folder; returns the exit code."""
    from rich.console import Console
    from rich.table import Table

    from stablelm_jax.storage.files import write_json

    rows, equal = drill.summary(), list(drill.ends.values()).count(None)
    title = f"{len(drill.hits)} signals; {equal} of {len(drill.ends)} ends equal bit for bit"
    table = Table(*rows[0] if rows else (), title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    path, first = drill.folder / "drill.json", drill.first_problem()
    write_json(path, {"summary": rows, "ends": drill.ends, "first_problem": first})
    print(f"report: {path}")
    if first is not None:
        print(f"drill: {first}", file=sys.stderr)
    return 0 if first is None else 1


if __name__ == "__main__":
    main()
