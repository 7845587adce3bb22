"""`metrics.jsonl`: the file of a run's metrics lines."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stablelm_jax.storage.files import write_text


def finite(value: float) -> float | None:
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
        write_text(self.path, "".join(map(_as_line, kept)))
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
        clean = {k: finite(v) if isinstance(v, float) else v for k, v in line.items()}
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
