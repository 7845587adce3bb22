"""A checkpoint as the verbs see it that use its weights: trained here or imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

from stablelm_jax.checkpoint.names import checkpoint_name, find_checkpoint
from stablelm_jax.checkpoint.reading import read_leaves, read_run
from stablelm_jax.checkpoint.tokenizer import load_own_tokenizer
from stablelm_jax.checkpoint.weights import load_weights
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import parameter_table
from stablelm_jax.tokenizer.tokenizer import Tokenizer


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
        """Reads all but the arrays. `tokenizer`: its place, where the training's is gone.

        Raises:
          ValueError: no checkpoint, a damaged one, or its tokenizer is not to be found.
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
        """Tokens of context."""
        if "config" in self.run:
            return self.run["config"]["data"]["sequence_length"]
        return self.run["imported"]["max_positions"]

    @property
    def chat_template(self) -> str | None:
        """Jinja, where the model was trained for one."""
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
        """Our parameters in float32, split over the mesh's `model` axis."""
        return load_weights(self.path, mesh)[2]

    def leaves(self) -> Iterator[tuple[str, np.ndarray]]:
        """Our parameters in float32, one at a time, each compared with its checksum."""
        shapes = {row.name: row.shape for row in parameter_table(self.model)}
        return read_leaves(self.path, shapes, self.run)
