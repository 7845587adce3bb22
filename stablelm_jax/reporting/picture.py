"""The picture of a run, its losses and its worth on held-out text; and that of several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stablelm_jax.reporting.curves import Curves, smooth
from stablelm_jax.storage.files import replacing


def draw_losses(curves: Curves, unigram_entropy: Mapping[str, float | None], path: Path) -> None:
    """Draws a run's metrics into the PNG `path`: losses, and bits a byte or held-out preferences.

    Bars around a held-out loss are its standard error over documents, where its line has that.
    `unigram_entropy`: nats of each source, the loss of knowing token frequencies alone; None where
    that is no measure.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    preferences = bool(curves["eval/rewards/accuracy"])
    worth = "rewards/accuracy" if preferences else "bits_per_byte"
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for number, (source, entropy) in enumerate(unigram_entropy.items()):
        colour = f"C{number % 10}"
        steps, losses = curves[f"loss/{source}"]
        left.plot(steps, losses, color=colour, alpha=0.2, linewidth=0.8)
        left.plot(steps, smooth(losses), color=colour)
        dots = {"marker": "o", "markersize": 5, "markeredgecolor": "black", "color": colour}
        held_out = curves[f"eval/loss/{source}"]
        left.plot(*held_out, linewidth=0, **dots)
        bars = curves.errors(f"eval/loss_stderr/{source}", held_out)  # NaN draws none
        left.errorbar(*held_out, yerr=bars, fmt="none", ecolor=colour, capsize=3)
        if entropy is not None:
            left.axhline(entropy, color=colour, linestyle=":", linewidth=1.2)
        right.plot(*curves[f"eval/{worth}/{source}"], label=source, **dots)
    unit = "nats a pair" if preferences else "nats a token"
    left.set(xlabel="step", ylabel=unit, title="Loss of each source")
    right.set(xlabel="step", ylabel="bits a byte of text", title="Held-out text")
    if preferences:
        right.set(ylabel="share of pairs", ylim=(0, 1), title="Held-out pairs: chosen preferred")
    dot = {"marker": "o", "markeredgecolor": "black", "lw": 0}
    meaning = (
        Line2D([], [], color="black", label="training"),
        Line2D([], [], color="black", label="held-out", **dot),
        Line2D([], [], color="black", linestyle=":", label="unigram entropy"),
    )
    left.legend(handles=meaning, fontsize=9)
    right.legend(fontsize=9)
    _save(figure, path)


def draw_runs(runs: Mapping[str, Curves], path: Path) -> None:
    """Draws held-out loss and learning rate of several runs, by name, over steps into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for number, (name, curves) in enumerate(runs.items()):
        colour = f"C{number % 10}"
        steps, losses = curves["loss"]
        top.plot(steps, smooth(losses), color=colour, alpha=0.35, linewidth=0.9)
        dots = {"marker": "o", "markersize": 4, "markeredgecolor": "black", "color": colour}
        top.plot(*curves["eval/loss"], label=f" {name}", **dots)  # matplotlib hides _name
        bottom.plot(*curves["learning_rate"], color=colour)
    top.set(ylabel="nats a token", title="Loss: held-out (dots), training (thin, smoothed)")
    for text in top.legend(fontsize=9).get_texts():
        text.set_parse_math(False)  # dollar signs in a name are no formula
    bottom.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    _save(figure, path)


def draw_documents(found: Mapping[str, Any], path: Path) -> None:
    """Draws `documents.statistics` into a PNG: lengths, bytes a token, languages."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    lengths, ratios, languages = figure.subplots(1, 3)
    for axes, key, what in (
        (lengths, "tokens_a_document", "By tokens, from"),
        (ratios, "bytes_a_token", "Of a sample, by bytes a token, from"),
    ):
        counts = found[key]["histogram"]
        axes.bar([f"{least:g}" for least in counts], counts.values(), color="C0")
        axes.set(ylabel="documents", title=what)
        axes.tick_params(axis="x", rotation=60)
    figure.suptitle(f"Documents of {found['source']}")
    told = found["languages"] or {"not told": 0}
    languages.barh(list(told)[:12][::-1], list(told.values())[:12][::-1], color="C1")
    languages.set(xlabel="documents", title="Of a sample, by language")
    _save(figure, path)


# Where a program's labels stand, so that those of three cross little.
_AT_DOT = {"textcoords": "offset points", "fontsize": 9}
_LABELS = (
    _AT_DOT | {"xytext": (6, 4)},
    _AT_DOT | {"xytext": (7, -10)},
    _AT_DOT | {"xytext": (-7, -10), "ha": "right"},
)


def draw_edge(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the rows of `report --edge` into a PNG: KL, and bits a byte, against size, labelled.

    The row without a KL is the model itself: a line. Of conversations it is nats a token.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    panels = figure.subplots(1, 2)
    files = [row for row in rows if row.get("kl_mean") is not None]
    in_bits = all(row["bits_per_byte"] is not None for row in rows)
    worth = {r["type"]: r["bits_per_byte"] if in_bits else r["held_out"]["eval/loss"] for r in rows}
    programs = list(dict.fromkeys(row["program"].split(" ")[0] for row in files))
    for number, program in enumerate(programs):
        mine = [row for row in files if row["program"].startswith(program)]
        megabytes = [row["bytes"] / 1e6 for row in mine]
        dots = {"color": f"C{number}", "markeredgecolor": "black", "label": program}
        for axes, values in zip(panels, ({r["type"]: r["kl_mean"] for r in mine}, worth)):
            axes.plot(megabytes, [values[row["type"]] for row in mine], "o", **dots)
            for row, x in zip(mine, megabytes):
                turned = 0 if number or axes is panels[0] else 30  # where dots lie side by side
                place = _LABELS[number % 3] | {"rotation": turned}
                axes.annotate(row["type"], (x, values[row["type"]]), **place)
    for row in rows:
        if row not in files:
            panels[1].axhline(worth[row["type"]], color="black", linestyle=":", label=row["type"])
    panels[0].set(yscale="log", ylabel="nats a token", title="KL from the unquantised model")
    unit = "bits a byte" if in_bits else "nats a token"
    panels[1].set(ylabel=unit, title="Held-out text")
    for axes in panels:
        axes.set(xlabel="MB")
        axes.margins(x=0.12)
    panels[1].legend(fontsize=9)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Writes a figure, with a grid, as the PNG `path`."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    with replacing(path) as aside:
        figure.savefig(aside, dpi=130, format="png")
