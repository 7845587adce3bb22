"""`train --config F --workdir D`: pretrains; goes on by itself where D holds a checkpoint.

Exit codes: 0 the run reached its last step; 75 stopped by a signal with a whole checkpoint, run
the same command again; 1 error; 2 bad config or arguments.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from absl import flags, logging

from stablelm_jax import config as config_lib
from stablelm_jax.run.signals import StopRequest
from stablelm_jax.run_verb import run_verb


def main(argv: Sequence[str] | None = None) -> None:
    """Leaves with one of the exit codes above. `argv`: the program's name, then its flags."""
    with StopRequest(last=True) as stop:  # from here on: importing takes seconds
        config_lib.define_flags(argv)
        flags.DEFINE_string("workdir", None, "The run's folder or gs:// URL.", required=True)
        flags.DEFINE_bool("strict", False, "A damaged newest checkpoint is an error.")
        flags.DEFINE_bool(
            "accept-config-change", False, "Resume with another config, and record it."
        )
        several = "Several processes (found by itself under SLURM and on Cloud TPUs): "
        flags.DEFINE_string("coordinator", None, several + "HOST:PORT of process 0.")
        flags.DEFINE_integer("num_processes", None, several + "how many.")
        flags.DEFINE_integer("process_id", None, several + "which one this is, from 0.")
        config_lib.run(lambda rest: _train(rest, stop), argv)


def _train(argv: Sequence[str], stop: StopRequest) -> int:
    config = config_lib.config_from_flags()
    logging.set_verbosity(logging.WARNING)  # the checkpoint library tells of each of its files
    set_by = config_lib.set_by(config, config_lib.overrides_from_flags())
    # Importing these takes seconds.
    from stablelm_jax.parallel import distributed
    from stablelm_jax.run.compilation import make_deterministic
    from stablelm_jax.training.begin import ResumeOptions
    from stablelm_jax.training.run import run_training
    from stablelm_jax.training.setup import fingerprints

    if config.training.deterministic:
        make_deterministic()
    given, processes = flags.FLAGS, None
    try:
        processes = distributed.find_processes(
            given.coordinator, given.num_processes, given.process_id
        )
        if processes is not None:
            distributed.start(processes, fingerprints(config))
        options = ResumeOptions(given.strict, given["accept-config-change"].value)
        return run_training(config, set_by, given.workdir, options, stop)
    except config_lib.ConfigError:
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if processes is not None:  # jax would wait for the others, who may wait for this one
            sys.stdout.flush()
            os._exit(1)
        return 1


if __name__ == "__main__":
    run_verb(main, "train", interrupted=None)
