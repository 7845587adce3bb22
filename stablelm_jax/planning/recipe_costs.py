"""`plan --recipe`: what the sources of a recipe cost before a run can begin.

Bytes to download and to keep, core-hours of each stage of the preparation, and how often a run goes
through each source. Nothing is asked of a server: sizes are those that the recipe holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from stablelm_jax import config as config_lib
from stablelm_jax.planning.report import table
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
    Stage("read, tokenize, write", 10.0, "measured: 7.8 to 12.2 (docs/log.md)"),
    Stage("filters: gopher", 0.11, "measured, busy cores (docs/data.md)", False),
    Stage("exact copies: hashes", 180.0, "measured (docs/data.md)"),
    Stage("near copies: signatures", 0.67, "measured; datatrove's authors: 0.9", False),
    Stage("near copies: matching", 19.0, "measured; datatrove's authors: 25", False),
    Stage("copies: shards without them", 6.0, "measured (docs/data.md)"),
)


def show(recipe: Recipe, config: ConfigDict) -> None:
    """Prints the tables for a run of `config`, which need not train on all of the sources."""
    console = make_console(file_width=120)
    weights = config_lib.mixture_weights(config)
    run_tokens = config.training.num_steps * config_lib.tokens_per_step(config)
    rows = [_row(source, weights, run_tokens) for source in recipe.sources]
    total = sum(source.tokens_an_epoch for source in recipe.sources)
    download = f"{_download(recipe):,.0f}"
    columns = ("source", "to download, GB", "text, GB", "tokens", "shards, GB", "tokens of the run")
    title = f"{recipe.name}: {run_tokens:,} tokens of {config.name}"
    ends = [(), ("all", download, *_sizes(total), f"{run_tokens:,}", "")]
    console.print(table(title, (*columns, "epochs"), [*rows, *ends]))
    for line in _notes(recipe, weights):
        console.print(line)
    title = "core-hours of each stage; filters and near copies: not of what must not be filtered"
    columns = ("stage", "sources", "text, GB", "MB/s a core", "core-hours", "the speed is")
    console.print(table(title, columns, _stages(recipe)))


def _row(source: RecipeSource, weights: dict[str, float], run_tokens: int) -> tuple[str, ...]:
    share = weights.get(source.name, 0.0) / sum(weights.values())
    epochs = f"{share * run_tokens / source.tokens_an_epoch:.2f}" if source.tokens else "?"
    size = _origin(source).gigabytes
    download = "?" if size is None else f"{size:,.1f}"
    sizes = _sizes(source.tokens_an_epoch) if source.tokens else ("?", "?", "?")
    return source.name, download, *sizes, f"{share * run_tokens:,.0f}", epochs


def _sizes(tokens: float) -> tuple[str, str, str]:
    text, shards = (f"{tokens * size / 1e9:,.1f}" for size in (BYTES_A_TOKEN, _SHARD_BYTES))
    return text, f"{tokens:,.0f}", shards


def _origin(source: RecipeSource) -> Origin:
    """The first place where anything is."""
    return next((o for o in source.origins if o.state != GONE), source.origins[0])


def _download(recipe: Recipe) -> float:
    """GB in all; files that several sources share are read once."""
    places = {(o.inputs, o.listed): o.gigabytes for o in map(_origin, recipe.sources)}
    return sum(size or 0 for size in places.values())


def _notes(recipe: Recipe, weights: dict[str, float]) -> Iterator[str]:
    yield (
        f"text: {BYTES_A_TOKEN} bytes a token; tokens: of one epoch, as reported; shards: int32; "
        "files that several sources share are counted once in the sum; rows that --keep throws "
        "away are downloaded and are no text"
    )
    names = [source.name for source in recipe.sources]
    for what, found in [
        ("size not known", [s.name for s in recipe.sources if _origin(s).gigabytes is None]),
        ("not in the config's weights", [name for name in names if name not in weights]),
        ("in the config's weights, not in the recipe", sorted(set(weights) - set(names))),
    ]:
        if found:
            yield f"{what}: {', '.join(found)}"


def _stages(recipe: Recipe) -> list[tuple[str, ...]]:
    rows = []
    for stage in STAGES:
        sources = [s for s in recipe.sources if stage.is_for_all or not s.unfiltered]
        text = sum(source.tokens_an_epoch for source in sources) * BYTES_A_TOKEN
        hours = text / 1e6 / stage.speed / 3600
        which = f"{len(sources)} of {len(recipe.sources)}"
        numbers = f"{text / 1e9:,.0f}", f"{stage.speed:g}", f"{hours:,.0f}"
        rows.append((stage.name, which, *numbers, stage.source))
    return rows
