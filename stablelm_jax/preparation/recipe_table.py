"""`prepare --recipe NAME --list`: each source of a recipe, where it lies, and how it is read."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from urllib.parse import urlsplit

from rich.console import Console

from stablelm_jax.preparation.formats import kind_of
from stablelm_jax.preparation.recipes import GONE, Origin, Recipe, RecipeSource

_KEYLESS = ("text", "html", "tar", "zip", "warc")


def show(recipe: Recipe, console: Console, in_full: bool) -> None:
    """Prints the recipe's sources, and which of them want a login or are gone.

    `in_full`: all places of each source, and what else to know; else the first that is there.
    """
    lines = [f"{recipe.name}: {recipe.about}"]
    for source in recipe.sources:
        numbers = f"  tokens {tokens_text(source.tokens)}, epochs {source.epochs:g}"
        lines += ["", source.name, *([numbers] if source.tokens else [])]
        lines += [f"  {line}" for line in _lines(source, in_full)]
    lines += ["", *_summary(recipe)]
    if not in_full:
        lines.append("all places of a source, and what is known of them: --source NAME --list")
    for line in lines:
        console.print(_wrapped(line, console.width), soft_wrap=True)


def _wrapped(line: str, width: int) -> str:
    """The line in rows that keep its indent, broken at spaces alone: a path can be copied."""
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(
        line.lstrip(),
        width,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def tokens_text(count: float) -> str:
    """So many tokens, in few columns."""
    for unit, size in {"T": 1e12, "B": 1e9, "M": 1e6}.items():
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:,.0f}"


def _lines(source: RecipeSource, in_full: bool) -> Iterator[str]:
    count = len(source.origins)
    for number, origin in enumerate(source.origins, 1):
        likely = f", likely: {origin.likely}" if origin.likely else ""
        yield f"{number} of {count}: {origin.state}{likely}"
        if origin.state != GONE:
            yield from _place(origin)
        if origin.note and (in_full or origin.state == GONE):
            yield f"  note: {origin.note}"
        if not in_full and origin.state != GONE:
            break
    filters = ", ".join(source.filters) or f"none: {source.unfiltered or 'none was thought of'}"
    yield f"filters: {filters}"
    if source.note and in_full:
        yield f"note: {source.note}"


def _place(origin: Origin) -> Iterator[str]:
    """Where files are, their format, and the flags by which they are read."""
    listing, written = origin.listed or ("", origin.inputs[0])
    more = f" and {len(origin.inputs) - 1} more" if len(origin.inputs) > 1 else ""
    yield f"  {written} of {listing}" if listing else f"  {written}{more}"
    kind, compression = kind_of(urlsplit(written).path, origin.format)
    parts = [f"{kind}.{compression}" if compression else kind]
    parts += [] if kind in _KEYLESS else [f"key {origin.text_key}"]
    parts += [f"keep {key}={pattern}" for key, pattern in origin.keep]
    parts += [f"split on {origin.split_on}"] if origin.split_on else []
    gate = f"; gate: ask at {origin.gate}" if origin.gate else ""
    yield f"  {', '.join(parts)}; certainty: {origin.certainty}{gate}"
    yield f"  licence: {origin.licence or 'not known'}"


def _summary(recipe: Recipe) -> Iterator[str]:
    groups = {
        "gated, ask there and set HF_TOKEN": lambda source: source.origins[0].gate,
        "gone or never public, --origin substitute": lambda s: s.origins[0].state == GONE,
        "not to be filtered": lambda source: source.unfiltered,
    }
    for what, is_of_it in groups.items():
        if names := [source.name for source in recipe.sources if is_of_it(source)]:
            yield f"{what}: {', '.join(names)}"
