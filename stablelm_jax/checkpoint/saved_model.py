"""A checkpoint as the verbs see it that use its weights: trained here or imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding

from stablelm_jax.checkpoint.merged import read_weights, weight_leaves
from stablelm_jax.checkpoint.names import checkpoint_name, checkpoint_path, find_checkpoint
from stablelm_jax.checkpoint.reading import read_run
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import nest, parameter_table
from stablelm_jax.parallel.sharding import mesh_axes
from stablelm_jax.tokenizer.chat import ChatTemplate, chat_template, plain_jinja, stop_ids
from stablelm_jax.tokenizer.tokenizer import ARCADE100K, Tokenizer, load_tokenizer

TOKENIZER_FILE = "tokenizer.json"  # in an imported checkpoint, or in the folder of a run


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """The model of a checkpoint, its arrays not yet read. `run`: the checkpoint's item `run`."""

    path: epath.Path
    run: Mapping[str, Any]
    model: ModelConfig
    tokenizer: Tokenizer

    @classmethod
    def open(cls, path: str | Path, tokenizer: str | None = None) -> SavedModel:
        """Reads all but the arrays. `tokenizer`: where it lies, if not where the training had it.

        ValueError: there is no checkpoint, it is damaged, or its tokenizer is not to be found.
        """
        path = find_checkpoint(path)
        run = read_run(path)
        try:
            model = ModelConfig(**run["model_config"])
        except TypeError as error:  # a field that is not known
            remedy = "use the version of stablelm_jax that wrote it"
            raise ValueError(f"{path} has a model of another version ({error}); {remedy}") from None
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
    def chat(self) -> ChatTemplate | None:
        """What the model was tuned on, itself or before it was imported; None for a base."""
        return saved_chat(self.run, self.tokenizer)

    def chat_or_own(self, named: str | None = None) -> ChatTemplate:
        """The template of a name or file, as `chat.chat_template` finds it; by default its own.

        ValueError: there is none, or it does not go with the tokenizer.
        """
        if named is None and self.chat is None:
            raise ValueError(
                f"{self.path} came with no chat template: name one, --chat zephyr, --chat chatml "
                "or --chat FILE of Jinja; a base model has learnt none of them"
            )
        return self.chat if named is None else chat_template(named, self.tokenizer)

    @property
    def chat_template(self) -> str | None:
        """Its Jinja for other software: as it came, where the model was imported with it."""
        came = self.run.get("imported", {}).get("chat_template")
        return came or (plain_jinja(self.chat.jinja) if self.chat else None)

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end a text, or a turn of a chat: first the one that its template writes."""
        written = stop_ids(self.tokenizer, self.chat) if self.run.get("chat") else []
        found = dict.fromkeys([*written, *self.run.get("imported", {}).get("end_ids", ())])
        return list(found) or [self.tokenizer.eod]

    @property
    def num_valid_ids(self) -> int | None:
        """Rows of the vocabulary that it was trained to predict; None: all, padding too."""
        return self.run.get("config", {}).get("training", self.run).get("num_valid_ids")

    def load(self, mesh: Mesh) -> dict[str, Any]:
        """Our parameters in float32, split over the mesh's `model` axis; errors: `read_arrays`."""
        leaves = {}
        for row in parameter_table(self.model):
            place = NamedSharding(mesh, mesh_axes(row.axes))
            leaves[row.name] = jax.ShapeDtypeStruct(row.shape, "float32", sharding=place)
        return read_weights(self.path, self.run, nest(leaves))

    def leaves(self) -> Iterator[tuple[str, np.ndarray]]:
        """Our parameters in float32, one at a time; errors: `weight_leaves`."""
        return weight_leaves(self.path, self.run)


def saved_chat(run: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template of the checkpoint with this item `run`, if it has one.

    `tokenizer`: its own. Imports kept the Jinja alone once; their ids of ends are its enders.
    """
    if run.get("chat"):
        return ChatTemplate.from_json(run["chat"])
    imported = run.get("imported", {})
    if not imported.get("chat_template"):
        return None
    ends = imported["end_ids"] or [tokenizer.eod]
    enders = tuple(tokenizer.decode([number]) for number in ends)
    return ChatTemplate("tokenizer", imported["chat_template"], enders)


def load_own_tokenizer(
    path: epath.PathLike,
    run: Mapping[str, Any],
    named: str | None = None,
    remedy: str = "name it with --tokenizer",
) -> Tokenizer:
    """The tokenizer that the checkpoint `path`, whose item `run` this is, was trained with.

    It is looked for where the training had it, in the checkpoint and in the folder of its run; or,
    if `named`, a name or the path of a tokenizer.json, there alone. ValueError, with the `remedy`:
    it is not there, or another than the checkpoint was trained with.
    """
    path = checkpoint_path(path)
    trained_with = run["config"]["data"]["tokenizer"] if "config" in run else ARCADE100K
    kept = [path / TOKENIZER_FILE, path.parent.parent / TOKENIZER_FILE]  # the second: its run's
    places = [named] if named else [trained_with, *(str(f) for f in kept if f.exists())]
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
        f"{remedy}"
    )
