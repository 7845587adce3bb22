"""The numbers of a run by step: what its pictures and its page are drawn from."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from stablelm_jax.run.metrics import parse_line

_SMOOTHING_LINES = 20


class Points(NamedTuple):
    """Values and the steps they belong to, float64 [N] each."""

    steps: np.ndarray
    values: np.ndarray

    def __bool__(self) -> bool:
        return len(self.steps) > 0


class Curves:
    """The columns of metrics lines, by key: 16 bytes a number, where dicts take ten times that."""

    def __init__(self, lines: Iterable[Mapping[str, Any]] = ()):
        self._columns: dict[str, tuple[array, array]] = {}
        self._read = (0, 0)  # file (its inode) and bytes of it that are in the columns
        for line in lines:
            self._add(line)

    @classmethod
    def of(cls, path: epath.PathLike) -> Curves:
        """Those of a `metrics.jsonl`, however damaged; none where there is no such file."""
        found = cls()
        with contextlib.suppress(FileNotFoundError), epath.Path(path).open("rb") as file:
            found._add_lines(file)
        return found

    def update(self, path: Path) -> None:
        """Takes in what was appended to `path` since the last call; all of a file that is new."""
        if not path.exists():
            return
        with path.open("rb") as file:
            inode = path.stat().st_ino
            if inode != self._read[0]:  # a start that cuts back lines writes the file anew
                self._columns, self._read = {}, (inode, 0)
            file.seek(self._read[1])
            taken = self._add_lines(file)
        self._read = (inode, self._read[1] + taken)

    def _add_lines(self, lines: Iterable[bytes]) -> int:
        """Returns how many bytes the whole lines had."""
        taken = 0
        for text in lines:
            if text.endswith(b"\n"):  # else the rest of it may come
                taken += len(text)
                if (line := parse_line(text)) is not None:
                    self._add(line)
        return taken

    def _add(self, line: Mapping[str, Any]) -> None:
        step, columns = line["step"], self._columns
        for key, value in line.items():
            if isinstance(value, (int, float)):
                if key not in columns:
                    columns[key] = array("d"), array("d")
                steps, values = columns[key]
                steps.append(step)
                values.append(value)

    def __bool__(self) -> bool:
        return bool(self._columns)

    def __getitem__(self, key: str) -> Points:
        """The points of a key; none where no line has it. Lines where it is null are left out."""
        return Points(*(np.array(column) for column in self._columns.get(key, ((), ()))))

    def names(self, prefix: str) -> list[str]:
        """What follows `prefix` in the keys that begin so, in the order in which they came."""
        return [key.removeprefix(prefix) for key in self._columns if key.startswith(prefix)]

    def last(self, key: str) -> float | None:
        """The last value of a key; None where there is none."""
        return self._columns[key][1][-1] if key in self._columns else None

    def errors(self, key: str, points: Points) -> np.ndarray:
        """The values of `key` at the steps of `points`, NaN where it has none: float64 [N]."""
        known = dict(zip(*self[key]))
        return np.array([known.get(step, np.nan) for step in points.steps])


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over the last few lines: a trailing window, so no line shows what came later."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - _SMOOTHING_LINES, 0)
    return (sums[end] - sums[begin]) / (end - begin)
