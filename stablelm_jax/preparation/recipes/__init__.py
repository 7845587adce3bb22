"""Recipes: the sources of a mixture, where each of them can be read today, and how.

A recipe is data, a Python file that sets `RECIPE`. The files beside this one have names; anybody's
own is given by its path: `prepare --recipe my_recipe.py --list`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import os
import pathlib

from stablelm_jax import configs_folder

PUBLISHED, SUBSTITUTE, GONE = ("as published", "substitute", "gone")
# How sure a fact is: read in code or on a card that opens this very path, told by somebody who saw
# it, concluded from other facts, or only remembered.
SEEN, TOLD, INFERRED, MEMORY = ("seen", "second hand", "inferred", "memory")


@dataclasses.dataclass(frozen=True)
class Origin:
    """A place that a source can be read from.

    Attributes:
      inputs: what `--input` takes; {output} in it stands for the folder of `--output`.
      state: what was trained on as far as is known, a stand-in for it, or a place
        where nothing is any more.
      listed: (URL of a text that holds the URL of a file a line, pattern of those to read), in
        place of `inputs` where a server lists no files.
      format, text_key, split_on, keep: as the flags of `prepare`.
      licence: of the texts.
      gate: the page where access is asked for; empty where anybody may read.
      likely: how likely it is what was trained on: high, medium or low; empty for a substitute.
      certainty: how sure path and keys are.
      gigabytes: to download, compressed as they are; None where it is not known.
      note: what else to know before it is read.
    """

    inputs: tuple[str, ...] = ()
    state: str = PUBLISHED
    listed: tuple[str, str] | None = None
    format: str = "auto"
    text_key: str = "text"
    split_on: str | None = None
    keep: tuple[tuple[str, str], ...] = ()
    licence: str = ""
    gate: str = ""
    likely: str = ""
    certainty: str = SEEN
    gigabytes: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class RecipeSource:
    """A source of a mixture.

    Attributes:
      name: as in the config's `data.weights`.
      origins: the places to read it from, the one to be preferred first.
      languages: ISO 639-1.
      tokens, epochs: of the whole run, as they were reported; 0 where nothing was.
      filters: those that make sense for it, as `--filters` takes them. None is applied unasked.
      unfiltered: why it must not be filtered.
      note: what else to know of it.
    """

    name: str
    origins: tuple[Origin, ...]
    languages: tuple[str, ...] = ()
    tokens: int = 0
    epochs: float = 0.0
    filters: tuple[str, ...] = ()
    unfiltered: str = ""
    note: str = ""

    @property
    def tokens_an_epoch(self) -> float:
        return self.tokens / self.epochs if self.epochs else 0.0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The sources of a mixture; of copies in several of them, the first one keeps its own.

    Attributes:
      config: the config file that weighs the sources: its name in the shipped folder, or a path.
      about: where the facts come from.
    """

    name: str
    sources: tuple[RecipeSource, ...]
    config: str = ""
    about: str = ""

    def source(self, name: str) -> RecipeSource:
        """The source of this name; ValueError, which names the nearest, where there is none."""
        names = [source.name for source in self.sources]
        if name not in names:
            near = difflib.get_close_matches(name.lower(), names, 1, 0.5)
            meant = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"--source {name}: recipe {self.name} has no such source; {meant}--list shows them"
            )
        return self.sources[names.index(name)]


def config_path(recipe: Recipe) -> pathlib.Path:
    """The config file that weighs the recipe's sources."""
    written = pathlib.Path(recipe.config)
    return written if written.exists() else configs_folder() / written


def load_recipe(name_or_path: str) -> Recipe:
    """The recipe of a name, or of a Python file; ValueError where there is none."""
    shipped = sorted(path.stem for path in pathlib.Path(__file__).parent.glob("[!_]*.py"))
    if name_or_path in shipped:
        module = importlib.import_module(f"{__name__}.{name_or_path}")
    elif name_or_path.endswith(".py") and os.path.isfile(name_or_path):
        spec = importlib.util.spec_from_file_location("recipe_file", name_or_path)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # a user's program: anything may come out of it
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"--recipe {name_or_path}: {what}") from error
    else:
        raise ValueError(
            f"--recipe {name_or_path}: no such recipe; there are {', '.join(shipped)}, and any "
            "Python file that sets RECIPE"
        )
    if not isinstance(recipe := getattr(module, "RECIPE", None), Recipe):
        raise ValueError(f"--recipe {name_or_path}: sets no RECIPE = Recipe(...)")
    return recipe
