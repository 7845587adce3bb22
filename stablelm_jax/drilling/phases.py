"""Which phase a training is in, as the files of its run folder show it from outside."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ml_collections import ConfigDict

# A signal in these ends the process at once, since there is nothing to save.
LEAVING = ("starting", "restoring", "compiling")
PHASES = (
    *LEAVING,
    "reference",  # of DPO alone
    *("stepping", "evaluating", "sampling", "saving", "writing", "finalising", "deleting"),
    "finishing",
)


def phase_of(workdir: Path, config: ConfigDict, launched: int) -> str:
    """One of `PHASES`, for a training in `workdir` launched at `launched` (ns since 1970).

    A start locks its folder, restores (or saves `global_step0`), cuts the metrics back, adds itself
    to environment.json, compiles, for DPO computes the reference, and from then on appends to
    metrics.jsonl. An evaluation, a sample or a save is due where the step of the last line is one
    for it.
    """
    from stablelm_jax.checkpoint.names import checkpoint_name, entries  # jax, which takes seconds

    if _changed(workdir / ".lock") < launched:
        return "starting"
    if (recorded := _changed(workdir / "environment.json")) < launched:
        return "restoring"
    if (written := _changed(workdir / "metrics.jsonl")) <= recorded:
        in_reference = _in_reference(workdir / "reference/key.json", recorded)
        return "reference" if in_reference else "compiling"
    with (workdir / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16))
        whole = file.read().rpartition(b"\n")[0]  # a line that is being written has no end yet
    if not whole:
        return "compiling"  # the first line is being written
    line, last = json.loads(whole.rpartition(b"\n")[2]), config.training.num_steps
    step, name = line["step"], checkpoint_name(line["step"])

    def due(every: int) -> bool:
        return every > 0 and (step % every == 0 or step == last)

    if due(config.evaluation.every) and "eval/loss" not in line:
        return "evaluating"
    sample = workdir / "samples" / f"{name}.txt"
    if due(config.samples.every) and step > 0 and _changed(sample) < written:
        return "sampling"
    if step == last:
        return "finishing"
    for path in (found := entries(workdir / "checkpoints")):
        if path.name.endswith(".deleting"):
            return "deleting"
        if ".orbax-checkpoint-tmp" in path.name:  # an item that is whole no longer has that ending
            return "finalising" if (path / "params").exists() else "writing"
    saved = name in [path.name for path in found]
    return "saving" if due(config.checkpoint.every) and not saved else "stepping"


def _in_reference(key: Path, recorded: int) -> bool:
    """Whether this start, of environment.json written at `recorded`, has pairs left to compute."""
    if _changed(key) <= recorded:
        return False
    found = json.loads(key.read_text(encoding="utf-8"))
    return found["done"] < found["pairs"]


def _changed(path: Path) -> int:
    """When a file was last written, in ns since 1970; 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
