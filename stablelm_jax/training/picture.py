"""The picture of a run: loss of the mixture and of each source, with the held-out points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SMOOTHING_STEPS = 20


def draw_losses(
    lines: Sequence[Mapping[str, Any]], unigram_entropy: Mapping[str, float], path: Path
) -> None:
    """Draws metrics lines into the PNG `path`.

    Args:
      unigram_entropy: nats of each source: what knowing token frequencies alone would give.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for number, (source, entropy) in enumerate(unigram_entropy.items()):
        colour = f"C{number}"
        steps, losses = _series(lines, f"loss/{source}")
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(losses), color=colour, label=f"{source}, training")
        axes.plot(
            *_series(lines, f"eval/loss/{source}"),
            "o-",
            color=colour,
            markersize=5,
            markeredgecolor="black",
            linewidth=0,
            label=f"{source}, held-out",
        )
        axes.axhline(
            entropy, color=colour, linestyle=":", linewidth=1.2, label=f"{source}, unigram entropy"
        )
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="Loss of each source")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    aside = path.with_name(path.name + ".partial")
    figure.savefig(aside, dpi=130, format="png")
    pyplot.close(figure)
    aside.replace(path)


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over the last few lines: a trailing window, so no line shows what came later."""
    windows = [values[max(0, i - _SMOOTHING_STEPS + 1) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
