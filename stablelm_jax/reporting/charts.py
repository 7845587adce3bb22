"""Charts as the paths of an SVG: what `run_page.html.jinja` needs to draw one, as plain numbers.

A plot is SIZE x SIZE units that the page stretches to the room there is; strokes and texts are not
stretched with it. y runs down, as in SVG.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from stablelm_jax.reporting.curves import Points

SIZE = 1000
_COLUMNS, _MOST_DOTS = 240, 40  # of a curve: more cannot be seen, and make the page large
_COLOURS, _DASHES = 9, 4  # of the page's style


@dataclasses.dataclass
class Curve:
    """One line of a chart, one row of dots, or both.

    Attributes:
      number: which colour and dashes, the same in all charts.
      hue: 0 to 1 of a scale of colours in their place; for what has an order, as layers.
      errors: above and below each dot; NaN for none.
      band: their least and most values are shown behind the line.
    """

    name: str
    line: Points | None = None
    dots: Points | None = None
    errors: np.ndarray | None = None
    number: int = 0
    hue: float | None = None
    band: Points | None = None

    def values(self) -> list[np.ndarray]:
        return [points.values for points in (self.line, self.dots) if points]

    def steps(self) -> list[np.ndarray]:
        return [points.steps for points in (self.line, self.dots) if points]


@dataclasses.dataclass
class Axis:
    """From numbers to places. `kind`: linear, log or time (seconds since 1970)."""

    low: float
    high: float
    kind: str = "linear"

    def place(self, values: Any) -> np.ndarray:
        """0 to SIZE for low to high; infinities for what has no logarithm."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        with np.errstate(divide="ignore", invalid="ignore"):
            return (self._scaled(np.asarray(values, float)) - low) / ((high - low) or 1) * SIZE

    def _scaled(self, values: Any) -> Any:
        return np.log10(values) if self.kind == "log" else values

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """(place, text) of round numbers."""
        if self.kind == "time":
            return self._times(most)
        if self.kind == "log":
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            each = (1, 2, 5) if last - first < most else (1,)
            every = range(first, last + 1, max(1, (last - first) // most))
            numbers = [10.0**power * n for power in every for n in each]
            numbers = [number for number in numbers if self.low <= number <= self.high]
        else:
            width = (self.high - self.low) / most or 1.0
            power = 10.0 ** math.floor(math.log10(width))
            width = next(power * n for n in (1, 2, 2.5, 5, 10) if power * n >= width * (1 - 1e-9))
            first = math.ceil(self.low / width - 1e-6)
            count = math.floor(self.high / width + 1e-6) - first + 1
            numbers = [(first + i) * width for i in range(count)]
        digits = next((n for n in range(4, 12) if _distinct(numbers, n)), 12)
        return [(float(self.place(number)), short(number, digits)) for number in numbers]

    def _times(self, most: int) -> list[tuple[float, str]]:
        times = np.linspace(self.low, self.high, 2 * most + 1)[1::2]
        pattern = "%m-%d %H:%M" if self.high - self.low > 3600 else "%H:%M:%S"
        texts = [datetime.datetime.fromtimestamp(t, datetime.UTC).strftime(pattern) for t in times]
        return [(float(self.place(t)), text) for t, text in zip(times, texts)]


def short(value: float | None, digits: int = 4) -> str:
    """A number in few characters: 0.00125, 4.3, 1,250, 12.5k, 1.2M; '' for none."""
    if value is None or not math.isfinite(value):
        return ""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.{digits}g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.{digits}g}"


def _distinct(numbers: Sequence[float], digits: int) -> bool:
    return len({short(number, digits) for number in numbers}) == len(numbers)


def chart(
    title: str,
    unit: str,
    curves: Iterable[Curve],
    *,
    x: Axis | None = None,
    y: Axis | None = None,
    log: bool = False,
    small: bool = False,
    **more: Any,
) -> dict[str, Any] | None:
    """What the page draws, and `more` beside it; None where no curve has a value.

    `x` and `y` are made to fit the curves unless given; `log`: y is, if all values are above 0.
    """
    curves = [curve for curve in curves if curve.values()]
    if not curves:
        return None
    x, y = x or steps_axis(curves), y or values_axis(curves, log)
    return {
        "title": title,
        "unit": unit,
        "small": small,
        "x": x,
        "y": y,
        "x_ticks": x.ticks(3 if small or x.kind == "time" else 6),
        "y_ticks": [(SIZE - place, text) for place, text in y.ticks(3 if small else 5)],
        "curves": [_drawn(curve, x, y) for curve in curves],
        **more,
    }


def steps_axis(curves: Sequence[Curve]) -> Axis:
    """From the first to the last step of all of them, with room for whole dots."""
    steps = np.concatenate([part for curve in curves for part in curve.steps()])
    first, last = float(steps.min()), float(max(steps.max(), steps.min() + 1))
    room = 0.012 * (last - first)
    return Axis(first - room, last + room)


def values_axis(curves: Sequence[Curve], log: bool = False) -> Axis:
    """Room for all values but a few that lie far from the others, as those of the first steps."""
    each = [part[np.isfinite(part)] for curve in curves for part in curve.values()]
    values = np.concatenate(each)
    if not len(values):
        return Axis(0.0, 1.0)
    least, most = float(values.min()), float(values.max())
    if log and least > 0:
        return Axis(least / 1.05, most * 1.05, "log")
    if any(len(part) > _MOST_DOTS for part in each):
        ends = [np.quantile(part, (0.01, 0.99)) for part in each if len(part) > _MOST_DOTS]
        ends += [part[1:] for part in each if 1 < len(part) <= _MOST_DOTS]
        low, high = (float(end(np.concatenate(ends))) for end in (np.min, np.max))
        least, most = max(least, low - (high - low) / 2), min(most, high + (high - low) / 2)
    edge = 0.04 * (most - least) or abs(most) * 0.05 or 1.0
    return Axis(float(least - edge), float(most + edge))


def thinned(points: Points) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps, and the mean, least and most value of each column that a screen can show: [N] each."""
    steps, values = points
    if len(steps) <= _COLUMNS:
        return steps, values, values, values
    edges = np.linspace(steps[0], steps[-1], _COLUMNS, endpoint=False)
    first = np.unique(np.searchsorted(steps, edges))
    counts = np.diff([*first, len(steps)])
    sums = [np.add.reduceat(part, first) / counts for part in (steps, values)]
    return *sums, np.minimum.reduceat(values, first), np.maximum.reduceat(values, first)


def _drawn(curve: Curve, x: Axis, y: Axis) -> dict[str, Any]:
    """The paths of one curve, its style and its last value."""
    style = f"c{curve.number % _COLOURS} d{curve.number // _COLOURS % _DASHES}"
    found: dict[str, Any] = {"name": curve.name, "style": style, "hue": curve.hue, "dots": []}
    if curve.line:
        found["last"] = short(curve.line.values[-1])
        steps, mean, _, _ = thinned(curve.line)
        found["line"] = _path(x.place(steps), y.place(mean))
    if curve.band:
        steps, _, low, high = thinned(curve.band)
        there_and_back = x.place(np.concatenate([steps, steps[::-1]]))
        found["band"] = _path(there_and_back, y.place(np.concatenate([low, high[::-1]])))
    if curve.dots:
        found["dots"] = list(_dots(curve, x, y))
        found["held_out"] = "" if curve.dots is curve.line else short(curve.dots.values[-1])
    return found


def _dots(curve: Curve, x: Axis, y: Axis) -> Iterator[dict[str, str]]:
    """A dot, its error bar and what it says when it is pointed at; the last one always."""
    steps, values = curve.dots
    errors = np.full(len(steps), np.nan) if curve.errors is None else curve.errors
    every = -(-len(steps) // _MOST_DOTS)
    for i in range((len(steps) - 1) % every, len(steps), every):
        where = moment(steps[i]) if x.kind == "time" else f"step {steps[i]:,.0f}"
        error = errors[i]
        bar = "" if np.isnan(error) else f" ± {error:.3g}"
        place = float(x.place(steps[i]))
        low, high = (SIZE - y.place(values[i] + sign * np.nan_to_num(error)) for sign in (-1, 1))
        yield {
            "at": f"M{place:.0f} {SIZE - float(y.place(values[i])):.1f}h0",
            "bar": bar and f"M{place:.0f} {low:.1f}V{high:.1f}",
            "says": f"{where}: {values[i]:.5g}{bar}",
        }


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """Points of an SVG polyline; what cannot be placed is left out."""
    kept = np.isfinite(x) & np.isfinite(y)
    return " ".join(f"{a:.0f},{SIZE - b:.1f}" for a, b in zip(x[kept], y[kept]))


def moment(time: float) -> str:
    """Seconds since 1970 as date and time of day, UTC."""
    try:
        return datetime.datetime.fromtimestamp(time, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):  # of a file that was damaged
        return str(time)
