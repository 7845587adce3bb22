"""Metrics: what is summed between two lines, the line itself, and the file of lines."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stablelm_jax.training.held_out import mean_losses


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An update that was left out.

    Attributes:
      step: of the metrics: the update that would have led to it.
      why: the step's "skipped".
      sources: {name: mean loss, or None where not finite} of the sources in its batch.
      grad_norm: of its gradient.
      in_a_row: how many were left out without one between them, this one included.
    """

    step: int
    why: int
    sources: dict[str, float | None]
    grad_norm: float
    in_a_row: int


class LossSums:
    """Loss and tokens by source since the last metrics line, of the updates that were applied.

    Steps add device arrays, which are fetched only when a line is due; the sums are kept in
    float64, whose text in a checkpoint is exact, so that a resumed run prints the same mean.

    Attributes:
      in_a_row: how many of the last updates were left out.
      before_row: `state()` before the first of these, or None.
    """

    def __init__(self, sources: Sequence[str], saved: Mapping[str, Any] | None = None):
        self._sources = list(sources)
        self._pending: list[tuple[int, Mapping[str, jax.Array]]] = []
        saved = saved or {}
        self._nll, self._tokens = (
            np.array([saved.get(key, {}).get(name, 0.0) for name in sources], np.float64)
            for key in ("nll", "tokens")
        )
        self.in_a_row: int = saved.get("in_a_row", 0)
        self.before_row: dict[str, Any] | None = saved.get("before_row")
        self._skipped: list[Skipped] = []

    def add(self, step: int, step_metrics: Mapping[str, jax.Array]) -> None:
        """Adds one step's "nll" and "tokens", float32 [S]; does not wait for the device."""
        kept = ("nll", "tokens", "skipped", "grad_norm")
        self._pending.append((step, {key: step_metrics[key] for key in kept}))

    def _fetch(self) -> None:
        for step, found in jax.device_get(self._pending):
            if found["skipped"]:
                self._skip(step, found)
                continue
            self.in_a_row, self.before_row = 0, None
            self._nll += found["nll"]
            self._tokens += found["tokens"]
        self._pending.clear()

    def _skip(self, step: int, found: Mapping[str, Any]) -> None:
        if not self.in_a_row:
            self.before_row = self._state()
        self.in_a_row += 1
        means = {
            name: _finite(float(nll) / float(tokens))
            for name, nll, tokens in zip(self._sources, found["nll"], found["tokens"])
            if tokens
        }
        norm = float(found["grad_norm"])
        self._skipped.append(Skipped(step, int(found["skipped"]), means, norm, self.in_a_row))

    def take_skipped(self) -> list[Skipped]:
        """The updates left out since the last call; waits for the devices."""
        self._fetch()
        taken, self._skipped = self._skipped, []
        return taken

    def state(self) -> dict[str, Any]:
        """The sums as JSON values, for the checkpoint."""
        self._fetch()
        row = {"in_a_row": self.in_a_row, "before_row": self.before_row}
        return self._state() | row if self.in_a_row else self._state()

    def _state(self) -> dict[str, Any]:
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
        self._unwritten: list[str] = []

    def read(self) -> list[dict[str, Any]]:
        """The whole lines; one that a crash cut short or filled with zeros is left out."""
        return self._read()[0]

    def _read(self) -> tuple[list[dict[str, Any]], int]:
        """The whole lines, and how many are none."""
        if not self.path.exists():
            return [], 0
        lines, broken = [], 0
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines(True):
            line = _parsed(text)
            if line is None:
                broken += 1
            else:
                lines.append(line)
        return lines, broken

    def cut_back(self, step: int) -> tuple[list[dict[str, Any]], int]:
        """Drops the lines past `step`, which a resumed run writes again, and broken ones.

        Returns:
          What stays, and how many lines were broken.
        """
        lines, broken = self._read()
        kept = [line for line in lines if line["step"] <= step]
        aside = self.path.with_suffix(".partial")
        aside.write_text("".join(map(_as_line, kept)), encoding="utf-8")
        os.replace(aside, self.path)
        return kept, broken

    def flush_to_disk(self) -> None:
        """Returns when a loss of power takes no line that was written."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes one line; values that are not finite become null.

        Raises:
          OSError: the disk takes nothing more. The line is written with the next one.
        """
        clean = {k: _finite(v) if isinstance(v, float) else v for k, v in line.items()}
        self._unwritten.append(_as_line(clean))
        if len(self._unwritten) > 1:  # the last time left half a line, or none
            self.cut_back(2**62)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(self._unwritten))
        self._unwritten.clear()


def _parsed(text: str) -> dict[str, Any] | None:
    """The line, or None where it is not a whole one."""
    if not text.endswith("\n"):
        return None
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def _as_line(line: Mapping[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"
