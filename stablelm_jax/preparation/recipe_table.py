"""`prepare --recipe NAME --list`: each source of a recipe, where it lies, and how it is read."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from rich import box
from rich.console import Console
from rich.table import Table

from stablelm_jax.preparation.formats import kind_of
from stablelm_jax.preparation.recipes import GONE, PUBLISHED, Origin, Recipe, RecipeSource

_WIDE = 140  # columns that a table of all needs; in fewer, the cells of a source stand in one
_WRAPPED = {"overflow": "fold"}


def show(recipe: Recipe, console: Console, in_full: bool) -> None:
    """Prints the recipe's sources, and which of them want a login, are gone, or have stand-ins.

    `in_full`: all places of each source, and what else to know; else the first one of each.
    """
    table = _wide(recipe) if console.width >= _WIDE and not in_full else _narrow(recipe, in_full)
    console.print(f"{recipe.name}: {recipe.about}", soft_wrap=False)
    console.print(table, soft_wrap=False)
    for line in _summary(recipe):
        console.print(line, soft_wrap=False)
    if not in_full:
        line = "all places of a source, and what is known of them: --source NAME --list"
        console.print(line, soft_wrap=False)


def _places(source: RecipeSource, in_full: bool) -> list[tuple[int, Origin]]:
    """The places to show; where the first one is gone, not that one alone."""
    places = [*enumerate(source.origins, 1)]
    is_gone = source.origins[0].state == GONE
    return places if in_full else places[: 2 if is_gone else 1]


def _wide(recipe: Recipe) -> Table:
    names = "state", "where", "format", "gate", "licence", "certainty", "filters"
    table = Table(box=box.SIMPLE)
    table.add_column("source", no_wrap=True)
    for name in names:
        table.add_column(name, **_WRAPPED, min_width=36 if name == "where" else None)
    for name in ("tokens", "epochs"):
        table.add_column(name, justify="right", no_wrap=True)
    for source in recipe.sources:
        for number, origin in _places(source, in_full=False):
            cells = _state(number, source), _where(origin), _how(origin), _gate(origin)
            cells += origin.licence, _certainty(origin)
            is_first = number == 1
            once = (_filters(source), *_size(source)) if is_first else ("", "", "")
            table.add_row(source.name if is_first else "", *cells, *once)
    return table


def _narrow(recipe: Recipe, in_full: bool) -> Table:
    table = Table("source", box=box.SIMPLE)
    table.columns[0].no_wrap = True
    table.add_column("state, where, format, gate, licence, certainty, filters", **_WRAPPED)
    for source in recipe.sources:
        tokens, epochs = _size(source)
        lines = [
            line
            for number, origin in _places(source, in_full)
            for line in _lines(number, source, in_full)
        ]
        lines.append(f"filters: {_filters(source)}")
        lines += [f"note: {source.note}"] if source.note and in_full else []
        name = f"{source.name}\n  tokens {tokens}\n  epochs {epochs}"
        table.add_row(name, "\n".join(lines))
        table.add_section()
    return table


def _lines(number: int, source: RecipeSource, in_full: bool) -> Iterator[str]:
    origin = source.origins[number - 1]
    yield _state(number, source)
    if where := _where(origin):
        yield f"  {where}"
        gate = f"; gate: {_gate(origin)}" if origin.gate else ""
        yield f"  {_how(origin)}; certainty: {_certainty(origin)}{gate}"
        yield f"  licence: {origin.licence or 'not known'}"
    if origin.note and (in_full or origin.state == GONE):
        yield f"  note: {origin.note}"


def _state(number: int, source: RecipeSource) -> str:
    origin = source.origins[number - 1]
    likely = f", likely: {origin.likely}" if origin.likely else ""
    return f"{number} of {len(source.origins)}: {origin.state}{likely}"


def _where(origin: Origin) -> str:
    if not origin.inputs:
        return "{1} of {0}".format(*origin.listed) if origin.listed else ""
    more = len(origin.inputs) - 1
    return origin.inputs[0] + (f" and {more} more" if more else "")


def _how(origin: Origin) -> str:
    """Its format, and the flags by which it is read."""
    if origin.state == GONE:
        return ""
    written = origin.listed[1] if origin.listed else origin.inputs[0]
    kind, compression = kind_of(urlsplit(written).path, origin.format)
    parts = [f"{kind}.{compression}" if compression else kind, f"key {origin.text_key}"]
    parts = parts[:1] if kind in ("text", "html") else parts
    parts += [f"keep {key}={pattern}" for key, pattern in origin.keep]
    return ", ".join(parts + ([f"split on {origin.split_on}"] if origin.split_on else []))


def _gate(origin: Origin) -> str:
    return f"ask at {origin.gate}" if origin.gate else "none"


def _certainty(origin: Origin) -> str:
    """How sure path and keys are; `likely`, of the state, is about what was trained on."""
    return "" if origin.state == GONE else origin.certainty


def _filters(source: RecipeSource) -> str:
    return ", ".join(source.filters) or f"none: {source.unfiltered or 'none was thought of'}"


def _size(source: RecipeSource) -> tuple[str, str]:
    tokens = f"{source.tokens / 1e9:,.2f} B" if source.tokens else "?"
    return tokens, f"{source.epochs:g}" if source.epochs else "?"


def _summary(recipe: Recipe) -> Iterator[str]:
    first = {source.name: source.origins[0] for source in recipe.sources}
    groups = {
        "gated, ask there and set HF_TOKEN": [n for n, o in first.items() if o.gate],
        "gone or never public, --origin substitute": [
            n for n, o in first.items() if o.state == GONE
        ],
        "a stand-in is all there is": [
            n for n, o in first.items() if o.state not in (GONE, PUBLISHED)
        ],
        "not to be filtered": [s.name for s in recipe.sources if s.unfiltered],
    }
    yield from (f"{what}: {', '.join(names)}" for what, names in groups.items() if names)
