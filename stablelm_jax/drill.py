"""`drill --config F --workdir D`: does this run survive being killed and stopped, bit for bit?

Trains F as a process of its own: once undisturbed, then disturbed: killed, or asked to stop, at a
random moment of each phase, and started again until it is done. Every line of metrics, the final
parameters, moments and ledger must be those of the undisturbed run.

    python -m stablelm_jax.drill --config configs/smoke.py --config.data.root=runs/smoke/data \\
        --config.training.num_steps=40 --workdir runs/drill --kills 10 --signals 10 --twice 2

Exit codes: 0 all is as it should be; 1 it is not, the first difference comes last; 2 bad config or
arguments; 130 Ctrl-C. Run again, it takes the undisturbed run from D and begins the rest anew.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags, logging

from stablelm_jax import config as config_lib
from stablelm_jax.drilling.plan import KILL, PHASES, TERM, TWICE

_INTERRUPTED = 130  # exit code, as shells give it for Ctrl-C
_CHILD = "stablelm_jax.drilling.child"


def main(argv: Sequence[str] | None = None, child: str = _CHILD) -> None:
    """Leaves with one of the exit codes above. `child`: the module that each process runs."""
    config_lib.define_flags(argv)
    flags.DEFINE_string("workdir", None, "The drill's folder on this machine.", required=True)
    flags.DEFINE_integer("kills", 10, "SIGKILLs.", lower_bound=0)
    flags.DEFINE_integer("signals", 10, "SIGTERMs.", lower_bound=0)
    flags.DEFINE_integer("twice", 2, "Times that a second SIGTERM follows the first.", 0)
    flags.DEFINE_integer("processes", 1, "Of each training, on this machine.", lower_bound=1)
    flags.DEFINE_integer("devices", None, "CPU devices of each process.", lower_bound=1)
    flags.DEFINE_integer("jobs", 1, "Disturbed trainings at a time.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the moments.")
    flags.DEFINE_list("phases", [], f"Which to hit, of {','.join(PHASES)}; default: all.")
    config_lib.run(lambda rest: _drill(child), argv)


def _drill(child: str) -> int:
    import jax

    config = config_lib.config_from_flags()
    given = flags.FLAGS
    _check(given)
    jax.config.update("jax_platforms", "cpu")  # in this process: the trainings have the device
    logging.set_verbosity(logging.ERROR)  # the checkpoint library tells of each of its files
    signal.signal(signal.SIGTERM, _leave)
    from rich.console import Console

    from stablelm_jax.drilling.rounds import Drill
    from stablelm_jax.drilling.starts import Setup

    console = Console(width=None if sys.stdout.isatty() else 120)
    folder = Path(given.workdir).resolve()
    setup = Setup(folder, given.processes, given.devices, child)
    began = time.monotonic()

    def say(text: str) -> None:
        line = f"{time.monotonic() - began:7.1f} s  {text}"
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    drill = Drill(config, setup, given.seed, say)
    try:
        drill.train_undisturbed()
        asked = {KILL: given.kills, TERM: given.signals, TWICE: given.twice}
        drill.run(asked, drill.phases(given.phases), given.jobs)
    except KeyboardInterrupt:
        print("interrupted; run the same command again", file=sys.stderr)
        return _INTERRUPTED
    except config_lib.ConfigError:
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return conclude(console, folder, drill.results, asked)


def _check(given: Any) -> None:
    for phase in given.phases:
        if phase not in PHASES:
            raise config_lib.ConfigError(f"--phases: no {phase!r}; there are {', '.join(PHASES)}")
    if "://" in given.workdir:
        raise config_lib.ConfigError(f"--workdir={given.workdir}: give a folder of this machine")


def conclude(console: Any, folder: Path, results: Any, asked: dict[str, int]) -> int:
    """Prints the table, writes `folder`/drill.json; returns the exit code."""
    from stablelm_jax.drilling import report
    from stablelm_jax.storage.files import write_json

    console.print(report.table(results))
    path = folder / "drill.json"
    write_json(path, report.to_json(results, asked))
    console.print(f"report: {path}", soft_wrap=True)
    first = results.first_problem()
    if first is None:
        return 0
    print(f"drill: {first}", file=sys.stderr)
    return 1


def _leave(number: int, frame: Any) -> NoReturn:
    """The trainings under way are ended on the way out."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
