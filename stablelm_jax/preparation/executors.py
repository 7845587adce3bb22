"""Where the tasks of `prepare` run: processes of this machine, a SLURM array, a Ray cluster.

The executors are datatrove's. Around them ours sees to it that a call returns only when every task
is done, or raises `TasksFailed`; that a worker that dies is noticed (datatrove's local executor
would wait for it for ever); and that workers do not outlive the process that started them.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import faulthandler
import math
import multiprocessing
import multiprocessing.forkserver
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from stablelm_jax.storage.remote import described, may_pass

EXECUTORS = ("local", "slurm", "ray")

# A job of an array runs several tasks one after the other, or starting Python would be most of it.
_ARRAY_ROUNDS = 4
_SLURM_POLL_SECONDS = 5.0
# Jobs leave the queue a moment before or after their last file is seen on a shared disk.
_SLURM_GRACE_SECONDS = 60.0
# Everything a worker imports: its tasks, and what `prepare`, the main module, brings along.
_PRELOADED = ["stablelm_jax.preparation.prepare_source", "rich.table"]
_AGAIN = "run the same command again to go on from here"


class TasksFailed(RuntimeError):
    """Not all tasks were done; the message says what is known and what to do.

    Attributes:
      killed: processes of this machine that were killed at work.
    """

    killed: Sequence[int] = ()


def remedy(error: Exception) -> str:
    """What to do about an error of reading, tokenising or writing."""
    if isinstance(error, MemoryError):
        return f"{_AGAIN}, with fewer --workers"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"free space on the disk, then {_AGAIN}"
    is_ours = not isinstance(error, OSError) and type(error).__module__ == "builtins"
    if is_ours and not isinstance(error, ImportError):
        return "it would come again: take the file out of the input, and please report it"
    return _AGAIN if may_pass(error) else f"mend that, then {_AGAIN}"


@dataclasses.dataclass(frozen=True)
class Executor:
    """Which executor, with how many tasks at a time, and what SLURM wants to know."""

    kind: str = "local"
    workers: int = 1
    slurm_partition: str = ""
    slurm_time: str = "24:00:00"
    slurm_options: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, flags: argparse.Namespace) -> Executor:
        """What the flags of `prepare` ask for; ValueError for what cannot be used here."""
        slurm, ray = flags.executor == "slurm", flags.executor == "ray"
        for is_wrong, problem in [
            (flags.workers < 1, "--workers: give a number from 1 up"),
            (slurm and not flags.slurm_partition, "give --slurm-partition (`sinfo` lists them)"),
            (
                slurm and not shutil.which("sbatch"),
                "no sbatch: run this where jobs can be submitted",
            ),
            (ray and not find_spec("ray"), 'Ray is missing: pip install "datatrove[ray]"'),
        ]:
            if is_wrong:
                raise ValueError(problem)
        of_slurm = flags.slurm_partition, flags.slurm_time, dict(flags.slurm_option)
        return cls(flags.executor, flags.workers, *of_slurm)

    def run(self, step: PipelineStep, tasks: int, logs: pathlib.Path) -> None:
        """Runs `step` for the ranks 0 to tasks-1, except those that `logs` knows as done.

        Raises:
          TasksFailed: some task was not done.
        """
        run = {"local": _run_local, "slurm": _run_slurm, "ray": _run_ray}[self.kind]
        run(self, step, tasks, logs)


def _run_local(options: Executor, step: PipelineStep, tasks: int, logs: pathlib.Path) -> None:
    logs.mkdir(parents=True, exist_ok=True)
    workers = min(options.workers, tasks)
    executor = LocalPipelineExecutor([step], tasks, workers, str(logs))
    # Workers fork from a server that has imported what they need, and so start at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOADED, type(step).__module__])
    _start_server(logs / "workers.log")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (str(logs / "workers.log"),))
    try:
        ranks = executor.get_incomplete_ranks()
        futures = [pool.submit(executor._run_for_rank, rank, 1) for rank in ranks]
        processes = dict(pool._processes)
        for future in as_completed(futures):
            future.result()
    except BrokenProcessPool:
        failed = TasksFailed(
            f"a worker was killed (by the kernel, if memory ran out): {_AGAIN}, with fewer"
            " --workers if it was memory"
        )
        alive = (None, 0, -signal.SIGTERM)  # the pool ends the others
        failed.killed = [pid for pid, each in processes.items() if each.exitcode not in alive]
        raise failed from None
    except BaseException as error:
        for worker in pool._processes.values():  # what they are doing is not waited for
            worker.kill()
        if not isinstance(error, Exception):
            raise
        name = type(error).__name__
        text = f"{name}: {error} (details: {logs / 'logs'}); {remedy(error)}"
        raise TasksFailed(text) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_server(output: pathlib.Path) -> None:
    """Starts what workers fork from: it prints to the file too, and leaves Ctrl-C to its parent."""
    # A new process inherits both, before Python runs in it. Ctrl-C is blocked and not ignored: one
    # that comes now reaches the parent in a moment.
    before, stderr = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}), os.dup(2)
    try:
        with output.open("ab") as file:
            os.dup2(file.fileno(), 2)
        multiprocessing.forkserver.ensure_running()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(output: str) -> None:
    """In each worker: its messages go to a file, and it ends when its parent does."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.enable(2)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


class _SlurmExecutor(SlurmPipelineExecutor):
    """datatrove's, without the job that adds up its statistics: the manifest holds ours."""

    def launch_merge_stats(self) -> None:
        pass


def _run_slurm(options: Executor, step: PipelineStep, tasks: int, logs: pathlib.Path) -> None:
    # The job gets this Python and this package; datatrove's program may be on no PATH there.
    root = pathlib.Path(__file__).parents[2]
    program = f'"{sys.executable}" -m datatrove.tools.launch_pickled_pipeline "$@"'
    executor = _SlurmExecutor(
        [step],
        tasks=tasks,
        time=options.slurm_time,
        partition=options.slurm_partition,
        workers=options.workers,
        job_name="stablelm_prepare",
        qos="",
        env_command=f'export PYTHONPATH="{root}${{PYTHONPATH:+:$PYTHONPATH}}"\n'
        f"launch_pickled_pipeline() {{ {program}; }}",
        sbatch_args=dict(options.slurm_options),
        logging_dir=str(logs),
        tasks_per_job=math.ceil(tasks / (options.workers * _ARRAY_ROUNDS)),
        with_srun=False,
    )
    note = logs / "slurm_job"
    job = note.read_text(encoding="utf-8") if note.exists() else ""
    if not (job and _is_queued(job)):  # else an earlier call was stopped, its jobs were not
        try:
            executor.run()
        except subprocess.CalledProcessError as error:
            code = error.returncode
            raise TasksFailed(f"sbatch failed with exit code {code}, see above") from None
        job = str(executor.job_id)
        note.write_text(job, encoding="utf-8")
    _wait_for_slurm(executor, job, logs)


def _wait_for_slurm(executor: SlurmPipelineExecutor, job: str, logs: pathlib.Path) -> None:
    seen = time.monotonic()
    while missing := executor.get_incomplete_ranks():
        time.sleep(_SLURM_POLL_SECONDS)
        if _is_queued(job):
            seen = time.monotonic()
        elif time.monotonic() - seen > _SLURM_GRACE_SECONDS:
            raise TasksFailed(
                f"SLURM job {job} left the queue with {len(missing)} of {executor.world_size} tasks"
                f" not done (see {logs / 'slurm_logs'}); mend what they say, then {_AGAIN}"
            )


def _is_queued(job: str) -> bool:
    command = ["squeue", "-h", "-j", job]
    queue = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    return queue.returncode == 0 and bool(queue.stdout.strip())


def _run_ray(options: Executor, step: PipelineStep, tasks: int, logs: pathlib.Path) -> None:
    import ray

    try:
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # its own, of many kinds
        raise TasksFailed(f"Ray could not be started: {described(error)}") from error
    executor = RayPipelineExecutor(
        [step], tasks=tasks, workers=options.workers, logging_dir=str(logs)
    )
    executor.run()
    if missing := executor.get_incomplete_ranks():
        raise TasksFailed(
            f"{len(missing)} of {tasks} Ray tasks were not done (see {logs / 'logs'}); mend what"
            f" they say, then {_AGAIN}"
        )
