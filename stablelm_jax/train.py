"""`train --config F --workdir D`: pretrains; goes on by itself where D holds a checkpoint.

Exit codes: 0 the run reached its last step; 75 stopped with a whole checkpoint (by a signal, a hang
or another process that is gone), run the same command again; 1 error; 2 bad config or arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from absl import flags, logging
from ml_collections import ConfigDict

from stablelm_jax import config as config_lib
from stablelm_jax.run.cpu import prepare_cpu
from stablelm_jax.run.signals import EXIT_STOPPED, StopRequest
from stablelm_jax.run_verb import run_verb

if TYPE_CHECKING:
    from stablelm_jax.parallel.meeting import Processes

_TELL_SECONDS = 30.0  # in which the others may come to hear why this process leaves


def main() -> None:
    """Leaves with one of the exit codes above."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        prepare_cpu()
    with StopRequest(last=True) as stop:  # from here on: importing takes seconds
        config_lib.define_flags()
        flags.DEFINE_string("workdir", None, "The run's folder or gs:// URL.", required=True)
        flags.DEFINE_bool("strict", False, "A damaged newest checkpoint is an error.")
        flags.DEFINE_bool(
            "accept-config-change", False, "Resume with another config, and record it."
        )
        several = "Several processes (found by itself under SLURM and on Cloud TPUs): "
        flags.DEFINE_string("coordinator", None, several + "HOST:PORT of process 0.")
        flags.DEFINE_integer("num_processes", None, several + "how many.")
        flags.DEFINE_integer("process_id", None, several + "which one this is, from 0.")
        try:
            config_lib.run(lambda _: _train(stop))
        except BaseException as error:
            _tell_the_others(error)
            raise


def _train(stop: StopRequest) -> int:
    config = config_lib.config_from_flags()
    logging.set_verbosity(logging.WARNING)  # the checkpoint library tells of each of its files
    set_by = config_lib.set_by(config, config_lib.overrides_from_flags())
    # Importing these takes seconds.
    from stablelm_jax.parallel.distributed import find_processes
    from stablelm_jax.parallel.meeting import MeetingError
    from stablelm_jax.run.compilation import make_deterministic
    from stablelm_jax.training.begin import ResumeOptions
    from stablelm_jax.training.run import run_training
    from stablelm_jax.workdir import check_workdir

    if config.training.deterministic:
        make_deterministic()
    given = flags.FLAGS
    options = ResumeOptions(given.strict, given["accept-config-change"].value)
    run = functools.partial(run_training, config, set_by, given.workdir, options, stop)
    try:
        processes = find_processes(given.coordinator, given.num_processes, given.process_id)
    except MeetingError as error:
        raise config_lib.ConfigError(str(error)) from error
    try:
        if processes is None:
            return run()
        check_workdir(given.workdir)
    except config_lib.ConfigError:
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return _train_among(processes, config, run, stop)


def _train_among(
    processes: Processes, config: ConfigDict, run: Callable[[], int], stop: StopRequest
) -> int:
    """`run` as one of several processes: where it fails, the others are told, and leave too."""
    from stablelm_jax.parallel import distributed
    from stablelm_jax.parallel.meeting import PeerGone, meet
    from stablelm_jax.run.events import HEARING_SECONDS
    from stablelm_jax.run.peers import Peers
    from stablelm_jax.training.setup import fingerprints

    try:
        connections = meet(processes, fingerprints(config), distributed.MEETING_SECONDS)
        peers = Peers(processes.index, connections, stop)  # each hears when another is gone
        distributed.start(processes)
        return peers.end(run())
    except Exception as error:
        expected = isinstance(error, ValueError | OSError)
        # The cause may be a process that is gone: then this one says so instead, and leaves.
        time.sleep(HEARING_SECONDS if expected else 5 * HEARING_SECONDS)
        codes = {config_lib.ConfigError: 2, PeerGone: EXIT_STOPPED}
        try:
            if not expected:
                traceback.print_exc()
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.stdout.flush()
        finally:  # Python's own end would wait for the others, who may wait for this one
            stop.leave(codes.get(type(error), 1))


def _tell_the_others(error: BaseException) -> None:
    """A process that fails before it meets the others says why, so that they need not wait for it.

    The command line is read once more: what failed may be the reading of its flags.
    """
    reason = error.__cause__ if isinstance(error, SystemExit) else error
    if reason is None:  # it came to its end
        return
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--coordinator")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--process_id", type=int)
    with contextlib.suppress(Exception):  # the error itself is told by whoever caught it
        given, _ = parser.parse_known_args()
        place = (given.coordinator, given.num_processes, given.process_id)
        if place == (None,) * 3 and not {"SLURM_PROCID", "TPU_WORKER_ID"} & os.environ.keys():
            return
        import jax

        from stablelm_jax.parallel.distributed import find_processes
        from stablelm_jax.parallel.meeting import meet

        processes = find_processes(*place)
        if processes is not None and not jax.distributed.is_initialized():
            meet(processes, {}, _TELL_SECONDS, f"{type(reason).__name__}: {reason}")


if __name__ == "__main__":
    run_verb(main, "train", interrupted=None)
