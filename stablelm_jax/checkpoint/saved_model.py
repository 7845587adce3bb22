"""A checkpoint as the verbs see it that use its weights: trained here or imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from stablelm_jax.checkpoint.names import checkpoint_name, checkpoint_path, find_checkpoint
from stablelm_jax.checkpoint.reading import read_arrays, read_leaves, read_run
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import nest, parameter_table
from stablelm_jax.parallel import sharding
from stablelm_jax.tokenizer.tokenizer import ARCADE100K, Tokenizer, load_tokenizer

TOKENIZER_FILE = "tokenizer.json"  # in an imported checkpoint, or in the folder of a run


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """The model of a checkpoint, its arrays not yet read.

    Attributes:
      run: the checkpoint's item `run`.
    """

    path: epath.Path
    run: Mapping[str, Any]
    model: ModelConfig
    tokenizer: Tokenizer

    @classmethod
    def open(cls, path: str | Path, tokenizer: str | None = None) -> SavedModel:
        """Reads all but the arrays.

        Args:
          tokenizer: where it lies, if no longer where the training had it.

        Raises:
          ValueError: there is no checkpoint, it is damaged, or its tokenizer is not to be found.
        """
        path = find_checkpoint(path)
        run = read_run(path)
        model = ModelConfig(**run["model_config"])
        return cls(path, run, model, load_own_tokenizer(path, run, tokenizer))

    @property
    def name(self) -> str:
        """global_step<N>."""
        return checkpoint_name(self.run["step"])

    @property
    def max_positions(self) -> int:
        """The length of the context, in tokens."""
        if "config" in self.run:
            return self.run["config"]["data"]["sequence_length"]
        return self.run["imported"]["max_positions"]

    @property
    def chat_template(self) -> str | None:
        """In Jinja, where the model was trained for one."""
        return self.run.get("imported", {}).get("chat_template")

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end a text, or a turn of a chat."""
        return list(self.run.get("imported", {}).get("end_ids", ())) or [self.tokenizer.eod]

    @property
    def num_valid_ids(self) -> int | None:
        """Rows of the vocabulary that it was trained to predict; None: all, padding too."""
        return self.run.get("config", {}).get("training", {}).get("num_valid_ids")

    def load(self, mesh: Mesh) -> dict[str, Any]:
        """Our parameters in float32, split over the mesh's `model` axis.

        Raises:
          DamagedCheckpoint: a parameter is missing, has another shape, or its bits have changed.
        """
        table = parameter_table(self.model)
        shapes = nest({row.name: jax.ShapeDtypeStruct(row.shape, "float32") for row in table})
        abstract = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            sharding.named(mesh, sharding.parameter_specs(table)),
        )
        return read_arrays(self.path, {"params": abstract}, self.run)["params"]

    def leaves(self) -> Iterator[tuple[str, np.ndarray]]:
        """Our parameters in float32, one at a time, each compared with its checksum."""
        shapes = {row.name: row.shape for row in parameter_table(self.model)}
        return read_leaves(self.path, shapes, self.run)


def load_own_tokenizer(
    path: epath.PathLike, run: Mapping[str, Any], named: str | None = None
) -> Tokenizer:
    """The tokenizer that the checkpoint `path`, whose item `run` this is, was trained with.

    It is looked for where the training had it, in the checkpoint and in the folder of its run.

    Args:
      named: look here alone: a name or a tokenizer.json.

    Raises:
      ValueError: it is not there, or another than the checkpoint was trained with.
    """
    errors = []
    for place in [named] if named else _tokenizer_places(checkpoint_path(path), run):
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


def _tokenizer_places(path: epath.Path, run: Mapping[str, Any]) -> Iterator[str]:
    trained_with = run.get("config", {}).get("data", {}).get("tokenizer")
    if trained_with:
        yield trained_with
    if trained_with == ARCADE100K:
        return
    if "config" not in run:
        yield ARCADE100K
    for folder in (path, path.parent.parent):  # the second is that of its run
        if (folder / TOKENIZER_FILE).exists():
            yield str(folder / TOKENIZER_FILE)
