"""What a recipe fills in for `prepare`, and what to do where a source of it cannot be had."""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Sequence
from typing import Any

from stablelm_jax.preparation.finding import InputError
from stablelm_jax.preparation.recipes import (
    GONE,
    SUBSTITUTE,
    Origin,
    Recipe,
    RecipeSource,
    config_path,
)
from stablelm_jax.storage.remote import as_path, why_not_there

ALL = "all"


def names_asked(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """The names after `--source`; ValueError where the recipe has no such source."""
    if list(names) == [ALL]:
        return [source.name for source in recipe.sources]
    return [recipe.source(name).name for name in dict.fromkeys(names)]


def filled(recipe: Recipe, name: str, flags: argparse.Namespace) -> dict[str, Any]:
    """Flag -> value, of all that a recipe knows better than the defaults of `prepare`.

    Raises:
      InputError: nothing is at the place, or what lists its files cannot be read.
    """
    source = recipe.source(name)
    place = _place(source, flags.origin)
    origin = source.origins[place - 1]
    facts = {key: getattr(origin, key) for key in ("state", "likely", "certainty")}
    by_hand = {"inputs": "given by hand"} if flags.inputs else {}
    return {
        "inputs": flags.inputs or _inputs(origin, flags.output),
        "format": origin.format,
        "text_key": origin.text_key,
        "split_on": origin.split_on,
        "languages": list(source.languages),
        "licence": origin.licence,
        "facts": {"name": recipe.name, "source": name, "place": place, **facts, **by_hand},
        # argparse would add what is given by hand to these, not put it in their place.
        "keep": None if flags.keep else [list(pair) for pair in origin.keep] or None,
    }


def filters_asked(source: RecipeSource, asked: Sequence[str]) -> Sequence[str]:
    """What `--filters` names, `recipe` standing for what the recipe says of this source.

    ValueError where others are asked for and the source must not be filtered.
    """
    if list(asked) == ["recipe"]:
        return source.filters
    if asked and source.unfiltered:
        raise ValueError(
            f"--filters: {source.name} must not be filtered ({source.unfiltered}); leave them out,"
            " or write --filters recipe, which filters no such source"
        )
    return asked


def _place(source: RecipeSource, asked: str | None) -> int:
    """The number of the place that `--origin` asks for, from 1; else, and for want of it, 1."""
    states = [origin.state for origin in source.origins]
    if asked == SUBSTITUTE:
        return states.index(SUBSTITUTE) + 1 if SUBSTITUTE in states else 1
    if asked is None or (asked.isdecimal() and 0 < int(asked) <= len(states)):
        return int(asked or 1)
    known = ", ".join(f"{number} ({state})" for number, state in enumerate(states, 1))
    raise ValueError(f"--origin {asked}: the places of {source.name} are {known}")


def _inputs(origin: Origin, output: str | None) -> list[str]:
    if origin.state == GONE:
        raise InputError(origin.note or "gone")
    if not origin.listed:
        return [written.replace("{output}", output or "{output}") for written in origin.inputs]
    url, pattern = origin.listed
    try:
        lines = as_path(url).read_bytes().decode().split()
    except FileNotFoundError as error:
        raise InputError(f"{url}: {why_not_there(error)}") from error
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from error
    if not (found := fnmatch.filter(lines, pattern)):
        raise InputError(f"{url} lists no file that fits {pattern}")
    return found


def elsewhere(recipe: Recipe, name: str, asked: str | None) -> str:
    """What to do where a source cannot be had from the place that was asked for."""
    source = recipe.source(name)
    tried, places = _place(source, asked), enumerate(source.origins, 1)
    others = [str(n) for n, origin in places if n != tried and origin.state != GONE]
    take = f"take another place, --origin {' or '.join(others)}; " if others else ""
    return f"{take}read a copy of yours, --input; or train without it, with the weights above"


def weights_without(recipe: Recipe, missing: Sequence[str]) -> str:
    """The flags that train without these sources, the weights of the others adding up to 1.

    The weights are those of the recipe's config; without one, they follow the reported tokens.
    """
    weights = {source.name: float(source.tokens) for source in recipe.sources}
    if recipe.config:
        from stablelm_jax.config import load  # a second, which few need

        weights = load(config_path(recipe)).data.weights.to_dict()
    left = {name: weight for name, weight in weights.items() if name not in missing}
    if not (whole := sum(left.values())):
        return ""
    now = dict.fromkeys(missing, 0.0) | {name: weight / whole for name, weight in left.items()}
    flags = " \\\n".join(f"  --config.data.weights.{name}={now[name]:.5f}" for name in now)
    return f"The weights without {', '.join(missing)}, for the command line of train:\n{flags}"
