"""`drill --config F --workdir D`: does this run survive being killed and stopped, bit for bit?

Trains F as a process of its own: once undisturbed, then disturbed: killed, or asked to stop, at a
random moment of each phase, and started again until it is done. Every line of metrics, the final
parameters, moments and ledger must be those of the undisturbed run.

    python -m stablelm_jax.drill --config configs/smoke.py --config.data.root=runs/smoke/data \\
        --config.training.num_steps=40 --workdir runs/drill --kills 10 --signals 10

The training knows nothing of it: the drill sees in the run folder what goes on. So the fewer steps
write a line of metrics (`training.log_every`), the fewer phases can be told apart.

Exit codes: 0 all is as it should be; 1 it is not, the first problem comes last; 2 bad config or
arguments; 130 Ctrl-C.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

from stablelm_jax.run_verb import end_after_interrupt, run_verb

if __name__ == "__main__":  # what is imported below takes a moment, in which Ctrl-C may come
    end_after_interrupt("drill: interrupted; run the same command again")

from absl import flags

from stablelm_jax import config as config_lib
from stablelm_jax.drilling.phases import PHASES
from stablelm_jax.run.console import make_console


def main() -> None:
    """Leaves with one of the exit codes above."""
    config_lib.define_flags()
    flags.DEFINE_string("workdir", None, "The drill's folder on this machine.", required=True)
    flags.DEFINE_integer("kills", 10, "How many SIGKILLs.", lower_bound=0)
    flags.DEFINE_integer("signals", 10, "How many SIGTERMs.", lower_bound=0)
    flags.DEFINE_integer("processes", 1, "Processes of each training.", lower_bound=1)
    flags.DEFINE_integer("devices", None, "CPU devices of each process.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "What is drawn depends on it.")
    flags.DEFINE_list("phases", [], f"Which to hit, of {','.join(PHASES)}; default: all.")
    config_lib.run(lambda rest: _drill(flags.FLAGS))


def _drill(given: Any) -> int:
    config = config_lib.config_from_flags()
    if unknown := set(given.phases) - set(PHASES):
        raise config_lib.ConfigError(f"--phases: no {min(unknown)!r}; use {', '.join(PHASES)}")
    if "://" in given.workdir:
        raise config_lib.ConfigError(f"--workdir={given.workdir}: give a folder of this machine")
    from stablelm_jax.storage.files import check_writable
    from stablelm_jax.workdir import check_workdir

    check_workdir(given.workdir)
    from stablelm_jax.drilling.rounds import Drill

    # Left by an exception, the drill ends the training under way.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) != signal.SIG_IGN:  # as under nohup
            signal.signal(ending, lambda number, frame: sys.exit(128 + number))
    overrides = config_lib.overrides_from_flags().items()
    config_flags = [f"--config={given['config'].config_filename}"]
    config_flags += [f"--config.{key}={value}" for key, value in overrides]
    drill = Drill(Path(given.workdir).resolve(), config, config_flags)
    drill.processes, drill.devices = given.processes, given.devices
    drill.rng.seed(given.seed)
    try:
        drill.folder.mkdir(parents=True, exist_ok=True)
        check_writable(drill.folder / "drill.json")
        drill.train_undisturbed()
        drill.run(given.kills, given.signals, given.phases)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return report(drill)


def report(drill: Any) -> int:
    """Prints how often each signal came, and writes it to drill.json; returns the exit code."""
    from rich.table import Table

    from stablelm_jax.storage.files import write_json

    table, came = Table("phase", "SIGKILL", "SIGTERM", "longest wait for a stop, s"), {}
    for phase in PHASES:
        hits = [start for start in drill.hits if start.hit == phase]
        waits = [start.seconds for start in hits if start.fault.signal == signal.SIGTERM]
        came[phase] = {"SIGKILL": len(hits) - len(waits), "SIGTERM": len(waits)}
        came[phase]["longest_wait"] = round(max(waits, default=0.0), 2)
        table.add_row(phase, *map(str, came[phase].values()))
    make_console(file_width=120).print(table)
    found = {"came": came, "runs": drill.runs, "problems": drill.problems}
    write_json(drill.folder / "drill.json", found)
    for problem in drill.problems[:1]:
        print(f"drill: {problem}", file=sys.stderr)
    return 1 if drill.problems else 0


if __name__ == "__main__":
    run_verb(main, "drill", interrupted="run the same command again")
