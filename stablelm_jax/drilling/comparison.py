"""Two run folders of the same run: equal bit for bit, or the first difference."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stablelm_jax.checkpoint.names import checkpoint_name, finished_steps
from stablelm_jax.checkpoint.reading import CheckpointError, read_run
from stablelm_jax.run.metrics import MetricsFile

# Of a line of metrics; what else stands there is time and what follows from it.
_KEYS = ("step", "loss", "learning_rate", "grad_norm", "param_norm", "updates_skipped")
_PREFIXES = ("loss/", "tokens/", "eval/")
_LEDGER = ("rows_consumed", "tokens", "loss_sums", "guard")
_MISSING = "nothing"


def first_difference(undisturbed: Path, disturbed: Path) -> str | None:
    """The first difference, with step, key and both values; None where there is none."""
    for difference in _differences(undisturbed, disturbed):
        return difference
    return None


def _differences(undisturbed: Path, disturbed: Path) -> Iterator[str]:
    one, other = (_lines(folder) for folder in (undisturbed, disturbed))
    for expected, found in zip(one, other):
        step = expected["step"]
        if found["step"] != step:
            yield f"{disturbed}: a line of step {found['step']} where step {step}'s should be"
        yield from _unequal(f"step {step}", expected, found)
    if len(one) != len(other):
        longer, folder = (one, disturbed) if len(one) > len(other) else (other, undisturbed)
        line = longer[min(len(one), len(other))]
        keys = ", ".join(sorted(line.keys() - {"step"})[:3])
        yield f"{folder}: no line of step {line['step']} with {keys} ({len(one)} and {len(other)})"
    yield from _of_checkpoints(undisturbed / "checkpoints", disturbed / "checkpoints")


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [_compared(line) for line in MetricsFile(folder / "metrics.jsonl").read()]


def _compared(line: dict[str, Any]) -> dict[str, Any]:
    wanted = (*_KEYS, "tokens_seen")
    return {k: v for k, v in line.items() if k in wanted or k.startswith(_PREFIXES)}


def _unequal(where: str, expected: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    for key in sorted(expected.keys() | found.keys()):
        values = [json.dumps(side[key]) if key in side else _MISSING for side in (expected, found)]
        if values[0] != values[1]:  # as text: -0.0 is not 0.0, and every float has one text
            yield f"{where}, {key}: {values[0]} undisturbed, {values[1]} disturbed"


def _of_checkpoints(undisturbed: Path, disturbed: Path) -> Iterator[str]:
    last = checkpoint_name(finished_steps(undisturbed)[-1])
    try:
        expected, found = (read_run(folder / last) for folder in (undisturbed, disturbed))
    except CheckpointError as error:
        yield str(error)
        return
    sums = (run["checksums"] for run in (expected, found))
    yield from _unequal(f"{last}, checksum of", *sums)
    yield from _unequal(
        last, *({key: run.get(key) for key in _LEDGER} for run in (expected, found))
    )
