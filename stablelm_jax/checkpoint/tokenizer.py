"""The tokenizer that a checkpoint was trained with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from stablelm_jax.checkpoint.names import checkpoint_path
from stablelm_jax.tokenizer.tokenizer import ARCADE100K, Tokenizer, load_tokenizer

FILE = "tokenizer.json"  # beside the items of a checkpoint that was imported, or in a run's folder


def load_own_tokenizer(
    path: epath.PathLike, run: Mapping[str, Any], named: str | None = None
) -> Tokenizer:
    """The tokenizer of the checkpoint `path`, whose item `run` this is.

    It is looked for where the training had it, in the checkpoint and in the folder of its run.

    Args:
      named: look here alone: a name or a tokenizer.json.

    Raises:
      ValueError: it is not there, or another than the checkpoint was trained with.
    """
    places = [named] if named else list(_places(checkpoint_path(path), run))
    errors = []
    for place in places:
        try:
            tokenizer = load_tokenizer(place)
        except ValueError as error:
            errors.append(str(error))
            continue
        if tokenizer.sha256 == run["tokenizer_sha256"]:
            return tokenizer
        errors.append(f"{place} is another tokenizer")
    raise ValueError(
        f"the tokenizer that {path} was trained with is not to be found: {'; '.join(errors)}; "
        "name it with --tokenizer"
    )


def _places(path: epath.Path, run: Mapping[str, Any]) -> Iterator[str]:
    trained_with = run.get("config", {}).get("data", {}).get("tokenizer")
    if trained_with:
        yield trained_with
    if trained_with != ARCADE100K:
        if "config" not in run:
            yield ARCADE100K
        for folder in (path, path.parent.parent):  # the second is that of its run
            if (folder / FILE).exists():
                yield str(folder / FILE)
