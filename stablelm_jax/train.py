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


def main(argv: Sequence[str] | None = None) -> None:
    """Leaves with one of the exit codes above. `argv`: the program's name, then its flags."""
    config_lib.define_flags(argv)
    flags.DEFINE_string("workdir", None, "The run's folder or gs:// URL.", required=True)
    several = "Several processes (found by itself under SLURM and on Cloud TPUs): "
    flags.DEFINE_string("coordinator", None, several + "HOST:PORT of process 0.")
    flags.DEFINE_integer("num_processes", None, several + "how many.")
    flags.DEFINE_integer("process_id", None, several + "which one this is, from 0.")
    config_lib.run(_train, argv)


def _train(argv: Sequence[str]) -> int:
    config = config_lib.config_from_flags()
    logging.set_verbosity(logging.WARNING)  # the checkpoint library tells of each of its files
    _set_compiler_flags(config)
    set_by = config_lib.set_by(config, config_lib.overrides_from_flags())
    from stablelm_jax.parallel import distributed  # starts jax: after its flags
    from stablelm_jax.training.loop import run_training
    from stablelm_jax.training.setup import fingerprints

    given = flags.FLAGS
    try:
        processes = distributed.find_processes(
            given.coordinator, given.num_processes, given.process_id
        )
        if processes is not None:
            distributed.start(processes, fingerprints(config))
        return run_training(config, set_by, given.workdir)
    except config_lib.ConfigError:
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _set_compiler_flags(config) -> None:
    """XLA reads its flags once, when its backend starts."""
    if config.training.deterministic:
        given = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{given} --xla_gpu_deterministic_ops=true".strip()


if __name__ == "__main__":
    main()
