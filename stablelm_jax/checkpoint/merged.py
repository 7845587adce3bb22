"""The weights of a checkpoint, whichever it holds: all of them, or adapters for its parent's.

A checkpoint of adapters names the checkpoint whose weights they are added to, and its hash. That
one may hold adapters itself, for the weights of another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from stablelm_jax.checkpoint import reading
from stablelm_jax.checkpoint.names import checkpoint_path, find_checkpoint
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.lora import A, B, Lora
from stablelm_jax.model.parameters import flatten, nest, parameter_table


def read_weights(path: epath.PathLike, run: Mapping[str, Any], abstract: Any) -> Any:
    """All weights of the checkpoint `path`, whose item `run` this is; adapters are added.

    `abstract`: tree of `ShapeDtypeStruct`s: how each is placed, and its type. Errors as below.
    """
    wanted, found = flatten(abstract), {}
    if "lora" not in run and all(like.dtype == "float32" for like in wanted.values()):
        return reading.read_arrays(path, {"params": abstract}, dict(run))["params"]
    for name, leaf in weight_leaves(path, run):
        like, leaf = wanted[name], leaf.astype(wanted[name].dtype)
        placed = jax.make_array_from_callback(like.shape, like.sharding, leaf.__getitem__)
        found[name] = placed.block_until_ready()
    return nest(found)


def weight_leaves(path: epath.PathLike, run: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """All weights in float32 by name, in the order of the table; the host holds one at a time.

    Raises:
      DamagedCheckpoint: a leaf is missing, has another shape, or its bits have changed.
      CheckpointError: of adapters: what they are added to is not to be found.
    """
    model = ModelConfig(**run["model_config"])
    if "lora" not in run:
        shapes = {row.name: row.shape for row in parameter_table(model)}
        yield from reading.read_leaves(path, shapes, dict(run))
        return
    adapters = dict(adapter_leaves(path, run))
    lora = Lora.from_json(run["lora"])
    for name, leaf in weight_leaves(*find_parent(path, run)):
        prefix = name.removesuffix("kernel")
        if prefix + A in adapters:
            leaf = lora.merged_leaf(leaf, adapters[prefix + A], adapters[prefix + B])
        yield name, leaf


def adapter_leaves(
    path: epath.PathLike, run: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """The adapters of a checkpoint that holds such, by name; errors: `read_leaves`."""
    table = Lora.from_json(run["lora"]).table(ModelConfig(**run["model_config"]))
    return reading.read_leaves(path, {row.name: row.shape for row in table}, dict(run))


def parent_of(path: epath.PathLike, run: Mapping[str, Any]) -> dict[str, str]:
    """What a checkpoint of adapters keeps of the one, `path`, whose weights they are added to."""
    hashed = reading.state_hash(run["checksums"])
    return {"parent": str(checkpoint_path(path)), "parent_hash": hashed}


def find_parent(
    path: epath.PathLike, run: Mapping[str, Any], named: str = ""
) -> tuple[epath.Path, dict[str, Any]]:
    """The checkpoint with the weights under the adapters of `path`, and its item `run`.

    It is looked for at the place `named`, where the run had it, and where the run's folder has a
    link `parent`. CheckpointError: it is in none of these, or not the one that it was.
    """
    lora, errors = run["lora"], []
    link = checkpoint_path(path).parent.parent / "parent"
    for place in filter(None, (named, lora["parent"], str(link) if link.exists() else "")):
        try:
            found = find_checkpoint(place)
            saved = reading.read_run(found)
        except ValueError as error:
            errors.append(str(error))
            continue
        if reading.state_hash(saved["checksums"]) == lora["parent_hash"]:
            return found, saved
        errors.append(f"{found} holds other weights")
    raise reading.CheckpointError(
        f"{path} holds adapters alone, for the weights of {lora['parent']}, which are not to be "
        f"found: {'; '.join(errors)}. Put that checkpoint back, or a link {link} to where it is"
    )
