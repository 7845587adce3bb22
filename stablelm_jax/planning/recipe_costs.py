"""`plan --recipe`: what the sources of a recipe cost before a run can begin.

Bytes to download and to keep, core-hours of each stage of the preparation, and how often a run goes
through each source. Nothing is asked of a server: sizes are those that the recipe holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict
from rich.table import Table

from stablelm_jax import config as config_lib
from stablelm_jax.planning.report import table
from stablelm_jax.preparation.recipe_table import tokens_text
from stablelm_jax.preparation.recipes import GONE, Origin, Recipe, RecipeSource
from stablelm_jax.run.console import make_console

BYTES_A_TOKEN = 4.3  # of text; 4.2 to 4.5 by Arcade100k, derived from the sources' sizes
_SHARD_BYTES = 4  # a token as int32


class Stage(NamedTuple):
    """A stage of the preparation, its speed in MB of text a second and core, and who says so."""

    name: str
    speed: float
    source: str
    is_for_all: bool = True  # else not for the sources that must not be filtered


STAGES = (
    Stage("read, tokenize, write", 24.3, "measured; 8.9 without the extra fast (docs/data.md)"),
    Stage("filters: gopher", 0.11, "measured on busy cores (docs/data.md)", False),
    Stage("exact copies: hashes", 231.0, "measured (docs/data.md)"),
    Stage("near copies: signatures", 1.53, "measured; datatrove's authors: 0.9", False),
    Stage("near copies: matching", 39.5, "measured; datatrove's authors: 25", False),
    Stage("copies: shards without them", 15.6, "measured (docs/data.md)"),
)


def show(recipe: Recipe, config: ConfigDict) -> None:
    """Prints the tables for a run of `config`, which need not train on all of the sources."""
    console = make_console(file_width=120)
    weights = config_lib.mixture_weights(config)
    run_tokens = config_lib.tokens_of_run(config)
    rows = [_row(source, weights, run_tokens) for source in recipe.sources]
    columns = ("source", "GB to\nfetch", "GB of\ntext", "tokens", "GB of\nshards")
    columns += ("tokens\nof run", "epochs")
    title = f"{recipe.name}: {run_tokens:,} tokens of {config.name}"
    every = ("all", _sum(_downloads(recipe), _gigabytes), *_sizes(recipe.sources))
    rows += [(), (*every, tokens_text(run_tokens), "")]
    console.print(_whole_numbers(table(title, columns, rows)))
    for line in _notes(recipe, weights):
        console.print(line)
    columns = ("stage", "sources", "GB of\ntext", "MB/s a\ncore", "core-\nhours")
    console.print(_whole_numbers(table("core-hours of each stage", columns, _stages(recipe))))
    console.print("filters and near copies: not of what must not be filtered")
    for stage in STAGES:
        console.print(f"speed of '{stage.name}': {stage.source}")


def _whole_numbers(found: Table) -> Table:
    """The table, in which a long name is folded before a number is cut."""
    name, *numbers = found.columns
    name.no_wrap, name.overflow = False, "fold"
    for column in numbers:
        column.no_wrap = True
    return found


def _row(source: RecipeSource, weights: dict[str, float], run_tokens: int) -> tuple[str, ...]:
    tokens = weights.get(source.name, 0.0) / sum(weights.values()) * run_tokens
    epochs = f"{tokens / source.tokens_an_epoch:.2f}" if source.tokens_an_epoch else "?"
    download = _sum([_origin(source).gigabytes], _gigabytes)
    return source.name, download, *_sizes([source]), tokens_text(tokens), epochs


def _sizes(sources: Sequence[RecipeSource]) -> tuple[str, str, str]:
    """GB of text, tokens and GB of shards of all of them."""
    tokens = [source.tokens_an_epoch or None for source in sources]
    text, shards = (_sum(tokens, _gigabytes, size / 1e9) for size in (BYTES_A_TOKEN, _SHARD_BYTES))
    return text, _sum(tokens, tokens_text), shards


def _sum(
    amounts: Iterable[float | None], write: Callable[[float], str], factor: float = 1.0
) -> str:
    """The sum times `factor`; with `+` where some amounts are not known, `?` if none is."""
    amounts = list(amounts)
    known = [amount for amount in amounts if amount is not None]
    if amounts and not known:
        return "?"
    return write(sum(known) * factor) + ("+" if len(known) < len(amounts) else "")


def _gigabytes(size: float) -> str:
    return f"{size:,.1f}" if size < 100 else f"{size:,.0f}"


def _origin(source: RecipeSource) -> Origin:
    """The first place where anything is."""
    return next((o for o in source.origins if o.state != GONE), source.origins[0])


def _downloads(recipe: Recipe) -> Iterable[float | None]:
    """GB of each place; files that several sources share are read once."""
    return {(o.inputs, o.listed): o.gigabytes for o in map(_origin, recipe.sources)}.values()


def _notes(recipe: Recipe, weights: dict[str, float]) -> Iterator[str]:
    yield (
        f"text: {BYTES_A_TOKEN} bytes a token; tokens: of one epoch, as reported; shards: int32; "
        "files that several sources share are counted once in the sum; rows that --keep throws "
        "away are downloaded and are no text"
    )
    names = [source.name for source in recipe.sources]
    for what, found in [
        ("size not known", [s.name for s in recipe.sources if _origin(s).gigabytes is None]),
        ("tokens not known", [s.name for s in recipe.sources if not s.tokens_an_epoch]),
        ("not in the config's weights", [name for name in names if name not in weights]),
        ("in the config's weights, not in the recipe", sorted(set(weights) - set(names))),
    ]:
        if found:
            yield f"{what}: {', '.join(found)}"


def _stages(recipe: Recipe) -> list[tuple[str, ...]]:
    rows = []
    for stage in STAGES:
        sources = [s for s in recipe.sources if stage.is_for_all or not s.unfiltered]
        tokens = [source.tokens_an_epoch or None for source in sources]
        hours = _sum(tokens, "{:,.0f}".format, BYTES_A_TOKEN / 1e6 / stage.speed / 3600)
        which = f"{len(sources)} of {len(recipe.sources)}"
        rows.append((stage.name, which, _sizes(sources)[0], f"{stage.speed:g}", hours))
    return rows
