"""What a run folder holds, read however damaged it is: what cannot be read is named."""

from __future__ import annotations

import datetime
import functools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from stablelm_jax.checkpoint.names import checkpoint_name
from stablelm_jax.config.tree import flatten
from stablelm_jax.reporting.curves import Curves
from stablelm_jax.run.metrics import finite

_MOST_SAMPLES = 12  # files of them that are read, evenly over the run


class RunRecord:
    """A run, from its folder.

    Attributes:
      tree, config: what `config.json` says, as it is nested and by dotted key; {} without it.
      set_by: where each value was set: default, file or command line.
      starts: [(seconds since 1970, entry)] of `environment.json`.
      events: the lines of `events.jsonl` that have a time, by that.
      problems: a line for each file that could not be read as a whole.
    """

    def __init__(self, folder: epath.PathLike, curves: Curves | None = None):
        """`curves`: its metrics, where they have been read. ValueError: it is no run folder."""
        self.folder, self.problems = epath.Path(folder), []
        self.name = self.folder.resolve().name
        self.curves = Curves.of(self.folder / "metrics.jsonl") if curves is None else curves
        settings = _mapping(self._json("config.json"))
        self.tree, self.set_by = (_mapping(settings.get(key)) for key in ("config", "set_by"))
        self.config = dict(flatten(self.tree))
        if not self.curves and not self.config:
            raise ValueError(
                f"{folder}: neither metrics.jsonl nor config.json has anything to show; name the "
                "--workdir of a training"
            )
        entries = self._json("environment.json")
        dated = [(_since_1970(start), start) for start in entries if isinstance(start, dict)]
        self.starts = [(time, start) for time, start in dated if time is not None]
        self.events = sorted(self._events(), key=lambda event: event["time"])

    @property
    def step(self) -> int:
        """The last one of its metrics."""
        return int(max(self.curves["step"].values, default=0))

    @functools.cached_property
    def sources(self) -> list[str]:
        """The names of those that its metrics know."""
        names = {*self.curves.names("loss/"), *self.curves.names("eval/loss/")}
        return sorted(name for name in names if not name.startswith("language/"))

    def spans(self) -> list[tuple[float, float, Mapping[str, Any]]]:
        """(begin, last sign of life, entry of `environment.json`) of each start."""
        times = [*self.curves["time"].values, *(event["time"] for event in self.events)]
        times, found = np.sort(np.array(times)), []
        ends = [time for time, _ in self.starts[1:]] + [math.inf]
        for (begin, entry), end in zip(self.starts, ends):
            seen = times[(times >= begin) & (times < end)]
            found.append((begin, float(seen[-1]) if len(seen) else begin, entry))
        return found

    def samples(self) -> dict[int, str]:
        """{step: text} of some of its samples, the first and the last among them."""
        folder, prefix = self.folder / "samples", checkpoint_name(0)[:-1]
        names = [path.stem.removeprefix(prefix) for path in folder.glob(f"{prefix}*.txt")]
        steps = sorted(int(name) for name in names if name.isdecimal())
        shown = np.linspace(0, len(steps) - 1, min(_MOST_SAMPLES, len(steps))).round().astype(int)
        files = {steps[i]: f"samples/{checkpoint_name(steps[i])}.txt" for i in shown}
        return {step: self._text(name) for step, name in files.items()}

    def _text(self, name: str) -> str:
        """A file; '' where there is none."""
        try:
            return (self.folder / name).read_bytes().decode(errors="replace")
        except FileNotFoundError:
            return ""
        except OSError as error:
            self.problems.append(f"{name} cannot be read: {error.strerror or error}")
            return ""

    def _json(self, name: str) -> Any:
        """What a file holds; {} where there is nothing to be had."""
        try:
            return finite(json.loads(self._text(name) or "{}"))
        except (ValueError, RecursionError):
            self.problems.append(f"{name} is damaged")
            return {}

    def _events(self) -> Iterator[dict[str, Any]]:
        broken = 0
        for line in self._text("events.jsonl").splitlines():
            try:
                event = finite(json.loads(line))
                yield {**event, "time": float(event["time"])}
            except (ValueError, RecursionError, TypeError, KeyError):
                broken += 1
        if broken:
            self.problems.append(f"events.jsonl: {broken} broken line(s) left out")


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _since_1970(start: Mapping[str, Any]) -> float | None:
    """When a start began; None where it does not say."""
    try:
        return datetime.datetime.fromisoformat(str(start.get("time"))).timestamp()
    except ValueError:
        return None
