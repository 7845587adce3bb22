"""Metrics: what is summed between two lines, the line itself, and the file of lines."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stablelm_jax.evaluation.held_out import mean_losses

# Dense bfloat16 TFLOP/s of one chip, from the makers' data sheets, by a part of jax's device_kind.
PEAK_TFLOPS: Mapping[str, float] = {
    "A100": 312.0,
    "H100": 989.0,
    "H200": 989.0,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5p": 459.0,
    "TPU v5": 459.0,
    "TPU v6 lite": 918.0,
}


def peak_flops(device: jax.Device) -> float | None:
    """FLOP/s of a chip in bfloat16; None where unknown (CPU among them)."""
    for part, tflops in PEAK_TFLOPS.items():
        if part in device.device_kind:
            return tflops * 1e12
    return None


class LossSums:
    """Loss and tokens by source since the last metrics line.

    Steps add device arrays, which are fetched only when a line is due; the sums are kept in
    float64, whose text in a checkpoint is exact, so that a resumed run prints the same mean.
    """

    def __init__(self, sources: Sequence[str], saved: Mapping[str, Any] | None = None):
        self._sources = list(sources)
        self._pending: list[Mapping[str, jax.Array]] = []
        self._nll = np.zeros(len(sources))
        self._tokens = np.zeros(len(sources))
        if saved:
            self._nll[:] = [saved["nll"][name] for name in sources]
            self._tokens[:] = [saved["tokens"][name] for name in sources]

    def add(self, step_metrics: Mapping[str, jax.Array]) -> None:
        """Adds one step's "nll" and "tokens", float32 [S]; does not wait for the device."""
        self._pending.append({key: step_metrics[key] for key in ("nll", "tokens")})

    def _fetch(self) -> None:
        for sums in jax.device_get(self._pending):
            self._nll += sums["nll"]
            self._tokens += sums["tokens"]
        self._pending.clear()

    def state(self) -> dict[str, dict[str, float]]:
        """The sums as JSON values, for the checkpoint."""
        self._fetch()
        return {
            "nll": dict(zip(self._sources, self._nll.tolist())),
            "tokens": dict(zip(self._sources, self._tokens.tolist())),
        }

    def take(self) -> dict[str, float | None]:
        """{"loss": mean, "loss/<source>": mean of each source seen}; starts again from zero."""
        self._fetch()
        means = mean_losses("loss", self._sources, self._nll, self._tokens)
        self._nll[:] = 0.0
        self._tokens[:] = 0.0
        return means


def _finite(value: float) -> float | None:
    """JSON has no NaN: a value that is not finite is written as null."""
    return float(value) if math.isfinite(value) else None


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, appended, whole lines only."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)

    def read(self) -> list[dict[str, Any]]:
        """The whole lines; a last line cut short by a crash is left out."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        return [json.loads(line) for line in whole.splitlines()]

    def cut_back(self, step: int) -> list[dict[str, Any]]:
        """Drops the lines past `step` (a resumed run writes them again); returns what stays."""
        kept = [line for line in self.read() if line["step"] <= step]
        aside = self.path.with_suffix(".partial")
        aside.write_text("".join(map(_as_line, kept)), encoding="utf-8")
        os.replace(aside, self.path)
        return kept

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes one line; values that are not finite become null."""
        clean = {k: _finite(v) if isinstance(v, float) else v for k, v in line.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_as_line(clean))


def _as_line(line: Mapping[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"
