"""Two run folders of the same run: equal bit for bit, or the first difference."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stablelm_jax.checkpoint.names import checkpoint_name, finished_steps
from stablelm_jax.checkpoint.reading import read_run
from stablelm_jax.run.metrics import MetricsFile

# What is compared of a line of metrics; the rest of it is time, and what follows from time.
_KEYS = ("step", "loss", "learning_rate", "grad_norm", "param_norm", "updates_skipped")
_PREFIXES = ("loss/", "tokens_seen", "tokens/", "rewards/", "logps/", "answer_tokens/", "eval/")
_LEDGER = ("rows_consumed", "tokens", "loss_sums", "guard")


def first_difference(undisturbed: Path, disturbed: Path) -> str | None:
    """The first difference in the lines of metrics, the last checkpoint's checksums or its ledger,
    with step, key and both values; None where there is none.

    CheckpointError: the last checkpoint of `undisturbed` is not in `disturbed`, or is damaged.
    """
    return next(_differences(undisturbed, disturbed), None)


def unaccounted(workdir: Path, began: float) -> str | None:
    """All seconds by cause and those since `began`; None where they are equal to 1 %."""
    line = MetricsFile(workdir / "metrics.jsonl").read()[-1]
    wall = line["time"] - began
    charged = sum(value for key, value in line.items() if key.startswith("seconds/"))
    if abs(charged - wall) <= 0.01 * wall:
        return None
    return f"the seconds by cause are {charged:.2f}, those of the clock {wall:.2f}"


def _differences(undisturbed: Path, disturbed: Path) -> Iterator[str]:
    files = [MetricsFile(folder / "metrics.jsonl").read() for folder in (undisturbed, disturbed)]
    for lines in itertools.zip_longest(*files, fillvalue={}):
        compared = [
            {key: line[key] for key in line if key in _KEYS or key.startswith(_PREFIXES)}
            for line in lines
        ]
        yield from _unequal(f"step {(lines[0] or lines[1])['step']}", *compared)
    last = checkpoint_name(finished_steps(undisturbed / "checkpoints")[-1])
    runs = [read_run(folder / "checkpoints" / last) for folder in (undisturbed, disturbed)]
    yield from _unequal(f"{last}, checksum of", *(run["checksums"] for run in runs))
    yield from _unequal(last, *({key: run.get(key) for key in _LEDGER} for run in runs))


def _unequal(where: str, expected: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    for key in sorted(expected.keys() | found.keys()):
        # As text: -0.0 is not 0.0, and every float has one text.
        one, other = (json.dumps(x[key]) if key in x else "nothing" for x in (expected, found))
        if one != other:
            yield f"{where}, {key}: {one} undisturbed, {other} disturbed"
