"""`metrics.jsonl`: the file of a run's metrics lines."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stablelm_jax.storage.files import write_text


def finite(value: Any) -> Any:
    """`value` with None for each number in it that JSON lacks: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, appended, whole lines only."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._unwritten: list[str] = []

    def read(self) -> list[dict[str, Any]]:
        """The whole lines; one that a crash cut short or filled with zeros is left out."""
        return [line for line in self._parsed() if line is not None]

    def _parsed(self) -> list[dict[str, Any] | None]:
        """Every line of the file; None for one that is not whole."""
        if not self.path.exists():
            return []
        parsed = []
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines(True):
            line = None
            if text.endswith("\n"):
                with contextlib.suppress(ValueError):
                    line = json.loads(text)
            whole = isinstance(line, dict) and isinstance(line.get("step"), int)
            parsed.append(line if whole else None)
        return parsed

    def cut_back(self, step: int) -> tuple[list[dict[str, Any]], int]:
        """Drops the lines past `step`, which a resumed run writes again, and broken ones.

        Returns:
          The lines that stay, and how many lines were broken.
        """
        parsed = self._parsed()
        kept = [line for line in parsed if line is not None and line["step"] <= step]
        write_text(self.path, "".join(map(_as_line, kept)))
        return kept, parsed.count(None)

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
        self._unwritten.append(_as_line(finite(dict(line))))
        if len(self._unwritten) > 1:  # the last time left half a line, or none
            self.cut_back(2**62)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(self._unwritten))
        self._unwritten.clear()


def _as_line(line: Mapping[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"
