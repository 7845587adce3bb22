"""Which charts a page has, of one run or of several over one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stablelm_jax.reporting.charts import Curve, chart, steps_axis, values_axis
from stablelm_jax.reporting.curves import Points, smooth
from stablelm_jax.reporting.run_record import RunRecord

_MOST_LINES = 8  # of a chart: so many colours can be told apart
_SMOOTHED = ("loss", "rewards/", "logps/")

_LAYERS = (
    ("grad_norm/layer", "Norm of the gradient"),
    ("activation_norm/layer", "Norm of the activations"),
)
# Heading, and of each chart below it: title, unit, {key: what it is}.
_FIXED = {
    "Preferences": (
        ("Chosen answer preferred", "share of the pairs", {"rewards/accuracy": "accuracy"}),
        (
            "Rewards",
            "beta x log-ratio to the reference",
            {f"rewards/{part}": part for part in ("chosen", "rejected", "margin")},
        ),
        (
            "Log-probability of the answers",
            "nats",
            {f"logps/{part}": part for part in ("chosen", "rejected")},
        ),
    ),
    "Optimization": (
        ("Learning rate", "", {"learning_rate": "learning rate"}),
        ("Norm of the gradient", "before clipping", {"grad_norm": "gradient"}),
        ("Norm of the weights", "", {"param_norm": "weights"}),
        ("Updates left out", "so far", {"updates_skipped": "left out"}),
    ),
    "Speed": (
        ("Tokens a second", "all devices", {"tokens_per_second": "tokens a second"}),
        ("Model FLOPs utilization", "of the peak", {"mfu": "mfu", "mfu_causal": "causal"}),
        ("Waiting for data", "seconds a step", {"data_wait_seconds": "wait"}),
        ("Slowest host behind the others", "seconds a step", {"step_seconds/spread": "behind"}),
        (
            "Device memory",
            "GiB, of the fullest",
            {"memory/in_use_gib": "in use", "memory/peak_gib": "peak"},
        ),
    ),
}


def sections(runs: Sequence[RunRecord]) -> dict[str, list[dict[str, Any]]]:
    """{heading: charts} of everything that at least one of the runs has numbers of."""
    is_pairs = any(run.curves["eval/rewards/accuracy"] for run in runs)
    unit = "nats a pair" if is_pairs else "nats a token"
    small = _each(runs, "loss/", unit) if _names(runs, "loss/")[1:] else []
    found = {"Loss": [_loss(runs, unit), *small], "Held-out text": _bits(runs)}
    for heading, charts in _FIXED.items():
        found[heading] = [_plain(runs, *one) for one in charts]
    found["Optimization"] += [_layers(runs, run, *kind) for run in runs for kind in _LAYERS]
    found["Tasks"] = _each(runs, "eval/tasks/", "score")
    kept = {heading: list(filter(None, charts)) for heading, charts in found.items()}
    return {heading: charts for heading, charts in kept.items() if charts}


def _names(runs: Sequence[RunRecord], prefix: str) -> list[str]:
    """What follows a prefix in the keys of training and of held-out text."""
    keys = (run.curves.names(start + prefix) for run in runs for start in ("", "eval/"))
    return sorted({name for names in keys for name in names if not name.startswith("language/")})


def _curve(run: RunRecord, key: str, name: str, number: int) -> Curve:
    """A metric of training as a line, and the same of held-out text as dots with errors."""
    line = run.curves[key]
    dots = line if key.startswith("eval/") else run.curves[f"eval/{key}"]
    errors = run.curves.errors(f"eval/{key.replace('loss', 'loss_stderr', 1)}", dots)
    errors = errors if key.startswith("loss") else None  # of nothing else they are known
    if key.startswith(_SMOOTHED):
        line = Points(line.steps, smooth(line.values))
    return Curve(name, line, dots, errors, number)


def _loss(runs: Sequence[RunRecord], unit: str) -> dict[str, Any] | None:
    """Of all sources together; of one run each source's too, where they are few."""
    names = ["all"] if len(runs) == 1 else [run.name for run in runs]
    curves = [_curve(run, "loss", name, i) for i, (run, name) in enumerate(zip(runs, names))]
    if len(runs) == 1:
        curves[0].band = runs[0].curves["loss"]
        if 1 < len(runs[0].sources) <= _MOST_LINES:
            for number, name in enumerate(runs[0].sources, 1):
                curves.append(_curve(runs[0], f"loss/{name}", name, number))
                curves[-1].dots = None  # they stand in the source's own chart
    return chart("Loss", unit, curves)


def _bits(runs: Sequence[RunRecord]) -> list[dict[str, Any] | None]:
    """Bits a byte by language, or by source where no language is known."""
    title, unit = "Bits a byte of held-out text", "by language, least is best"
    prefix = "eval/bits_per_byte/language/"
    if not any(run.curves.names(prefix) for run in runs):
        prefix, unit = "eval/bits_per_byte/", "by source, least is best"
    if len(runs) > 1 or len(runs[0].curves.names(prefix)) > _MOST_LINES:
        return _each(runs, prefix, "bits a byte")
    found = ((name, runs[0].curves[prefix + name]) for name in runs[0].curves.names(prefix))
    curves = [Curve(name, points, points, number=i) for i, (name, points) in enumerate(found, 1)]
    return [chart(title, unit, curves)]


def _plain(
    runs: Sequence[RunRecord], title: str, unit: str, keys: Mapping[str, str]
) -> dict[str, Any] | None:
    curves = []
    for run in runs:
        for key, what in keys.items():
            if np.any(run.curves[key].values):
                parts = [run.name] * (len(runs) > 1) + [what] * (len(runs) == 1 or len(keys) > 1)
                curves.append(_curve(run, key, ", ".join(parts), len(curves)))
    return chart(title, unit, curves, log="grad_norm" in keys)


def _layers(
    runs: Sequence[RunRecord], run: RunRecord, key: str, title: str
) -> dict[str, Any] | None:
    """A line for each layer, in colours that run from the first to the last."""
    names = sorted(filter(str.isdecimal, run.curves.names(key)), key=int)
    hues = np.linspace(0, 1, len(names))
    curves = [Curve(f"layer {n}", run.curves[key + n], hue=hue) for n, hue in zip(names, hues)]
    return chart(f"{title} by layer", run.name if runs[1:] else "", curves, log=True)


def _each(runs: Sequence[RunRecord], prefix: str, unit: str) -> list[dict[str, Any] | None]:
    """A small chart for each name after a prefix; all have one scale."""
    first = 1 if len(runs) == 1 else 0  # a source has the colour that it has in the large chart
    charts = {
        name: [_curve(run, prefix + name, run.name, i) for i, run in enumerate(runs)]
        for name in _names(runs, prefix)
    }
    for number, curves in enumerate(charts.values() if first else ()):
        curves[0].number = number % _MOST_LINES + first
    every = [curve for curves in charts.values() for curve in curves if curve.values()]
    axes = {"y": values_axis(every), "x": steps_axis(every)} if every else {}
    return [chart(name, unit, curves, small=True, **axes) for name, curves in charts.items()]
