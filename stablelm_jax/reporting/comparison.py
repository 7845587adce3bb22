"""Comparisons as a person reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from stablelm_jax.reporting.compare import Comparison, Cost, Difference, Worth, compare
from stablelm_jax.reporting.paired import LEVEL, Interval
from stablelm_jax.run.console import make_console
from stablelm_jax.run.metrics import finite
from stablelm_jax.storage.files import check_writable, write_json


def show_comparisons(
    folders: Sequence[str], last: int | None = None, file: str | None = None
) -> list[Comparison]:
    """Prints how each run compares with the first, and returns it; the JSON `file` gets it too.

    Raises ValueError as `compare` does.
    """
    if file:
        check_writable(Path(file))
    found = [compare(folders[0], other, last) for other in folders[1:]]
    console = make_console(file_width=120)
    for comparison in found:
        _show(console, comparison)
    if file:
        write_json(Path(file), finite([dataclasses.asdict(comparison) for comparison in found]))
    return found


def _show(console: Console, found: Comparison) -> None:
    console.print(f"A is {found.a}, B is {found.b}", style="bold", soft_wrap=True)
    for key, (of_a, of_b) in found.changes.items():
        console.print(f"  config.{key}: A {of_a!r}, B {of_b!r}", soft_wrap=True)
    for note in found.notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True)
    if trained := found.trained:
        title = f"training, steps {trained.first + 1:,} to {trained.last:,}"
        title += f", blocks of {trained.block_steps:,} steps"
        console.print(_differences(title, "lines", trained.by_source))
    if evaluated := found.evaluated:
        steps = {f"step {evaluated.step_a:,} of A": 0, f"step {evaluated.step_b:,} of B": 0}
        title = f"held-out text after {' and '.join(steps)}, paired by document"
        console.print(_differences(title, "documents", evaluated.by_source))
        console.print(verdict(found), style="bold")
    if found.worth:
        console.print(worth_text(found.worth, evaluated.tokens_b))
    console.print(_costs(found.costs))


def _differences(title: str, counted: str, by_source: Mapping[str, Difference]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("nats a token", no_wrap=True)
    for column in ("A", "B", "B - A", f"{LEVEL:.0%} interval", counted):
        table.add_column(column, justify="right")
    for name, row in by_source.items():
        difference = f"{row.difference.mean:+.4f}"
        cells = (f"{row.a:.4f}", f"{row.b:.4f}", difference, interval_text(row.difference))
        table.add_row(name, *cells, f"{row.count:,}")
    return table


def interval_text(interval: Interval) -> str:
    """'none' where too little is known."""
    if interval.low is None:
        return "none"
    return f"{interval.low:+.4f} to {interval.high:+.4f}"


def verdict(found: Comparison) -> str:
    """One sentence: which is better on held-out text, as far as can be told."""
    interval = found.evaluated.by_source["all"].difference
    if interval.low is None:
        return "Too few held-out documents to say which is better."
    if interval.is_zero_within:
        return f"No difference can be told: {interval_text(interval)} nats a token holds 0."
    better, worse = ("B", "A") if interval.mean < 0 else ("A", "B")
    by = f"by {abs(interval.mean):.4f} nats a token"
    return f"{better} is better than {worse}, {by}; other seeds may differ otherwise."


def worth_text(worth: Worth, of_b: float) -> str:
    """What B is worth in tokens of A."""

    def amount(tokens: float | None) -> str:
        if tokens is None:
            return f"more than {worth.most:,.3g}"
        return f"{tokens:,.3g}" if tokens > worth.least else f"{worth.least:,.3g} or less"

    text = f"A reaches B's held-out loss after {amount(worth.tokens)} tokens"
    if worth.tokens is not None:
        text += f", {worth.tokens / of_b:.2f} times the {of_b:,.3g} of B"
    text += f"; {LEVEL:.0%} interval {amount(worth.low)} to {amount(worth.high)}"
    ends = (worth.tokens, worth.low, worth.high)
    if any(end is None or end > worth.measured for end in ends):
        text += f" (foretold along A's curve beyond its {worth.measured:,.3g} tokens)"
    return f"{text}."


def _costs(costs: tuple[Cost, Cost]) -> Table:
    table = Table(title="cost", title_justify="left")
    for column in (
        "",
        "steps",
        "tokens",
        "tokens/s",
        "hours in steps",
        "device-hours",
        "wall hours",
    ):
        table.add_column(column, justify="right")
    for name, cost in zip("AB", costs):
        hours = (cost.hours, cost.device_hours, cost.wall_hours)
        texts = ("" if value is None else f"{value:,.3g}" for value in hours)
        table.add_row(
            name, f"{cost.steps:,}", f"{cost.tokens:,.3g}", f"{cost.tokens_per_second:,.0f}", *texts
        )
    return table
