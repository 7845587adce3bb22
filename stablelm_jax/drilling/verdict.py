"""Whether a start that met a fault ended as it should."""

from __future__ import annotations

import signal
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from stablelm_jax.checkpoint.names import checkpoint_name, finished_steps
from stablelm_jax.checkpoint.reading import CheckpointError, read_arrays, read_run
from stablelm_jax.drilling.plan import KILL, LEAVING, Fault
from stablelm_jax.drilling.starts import Ended
from stablelm_jax.run.metrics import MetricsFile
from stablelm_jax.run.signals import EXIT_STOPPED


def newest_step(workdir: Path) -> int | None:
    """Of the newest finished checkpoint; None where there is none."""
    folder = workdir / "checkpoints"
    return max(finished_steps(folder), default=None) if folder.exists() else None


def problem(fault: Fault, ended: Ended, workdir: Path, before: int | None, last: int) -> str | None:
    """What is not as it should be after a fault; None where all is.

    `before`: the newest checkpoint's step before this start; `last`: of the run.
    """
    if ended.hung:
        return f"did not end within its time; {ended.last_words()}"
    if fault.kind == KILL:
        code = ended.codes[fault.process]
        return None if code == -signal.SIGKILL else f"exit code {code}; {ended.last_words()}"
    return _wrong_code(ended, fault, workdir, last) or _wrong_checkpoint(ended, workdir, before)


def _wrong_code(ended: Ended, fault: Fault, workdir: Path, last: int) -> str | None:
    left = ended.hit["phase"] in LEAVING
    if ended.ended_by_us and not left:
        return f"processes {sorted(ended.ended_by_us)} went on without the others"
    done = newest_step(workdir) == last
    for index, code in enumerate(ended.codes):
        if left and index != fault.process:
            continue  # it met a process that was gone
        if code != EXIT_STOPPED and not (code == 0 and done):
            return f"exit code {code} instead of {EXIT_STOPPED}; {ended.last_words()}"
    return None


def _wrong_checkpoint(ended: Ended, workdir: Path, before: int | None) -> str | None:
    newest = newest_step(workdir)
    if newest is None:
        if ended.hit["phase"] in LEAVING and before is None:
            return None  # nothing had begun
        return "nothing was saved"
    if before is not None and newest < before:
        return f"the newest checkpoint is of step {newest}, and was of step {before} before"
    if ended.hit["phase"] not in LEAVING:
        reached = max((line["step"] for line in MetricsFile(workdir / "metrics.jsonl").read()),
                      default=0)  # fmt: skip
        if reached > newest:
            return f"step {reached} was reached, but only step {newest} was saved"
    return damage(workdir / "checkpoints" / checkpoint_name(newest))


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole; None where it is, every leaf's checksum included."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    try:
        run = read_run(checkpoint)
        abstract = {}
        for item in ("params", "optimizer"):
            with ocp.StandardCheckpointer() as reader:
                found = reader.metadata(checkpoint / item).item_metadata
            abstract[item] = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                dict(found),
            )
        read_arrays(checkpoint, abstract, run)
    except CheckpointError as error:
        return str(error)
    return None
