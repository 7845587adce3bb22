"""The weights of a checkpoint, for the verbs that only use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from stablelm_jax.checkpoint.checksum import checksums
from stablelm_jax.checkpoint.names import find_checkpoint
from stablelm_jax.checkpoint.reading import FORMAT_VERSION, read_arrays, read_run, sealed
from stablelm_jax.checkpoint.store import item_handlers
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import nest, parameter_table
from stablelm_jax.parallel import sharding


def load_weights(path: str | Path, mesh: Mesh) -> tuple[dict[str, Any], ModelConfig, Any]:
    """The item `run`, the model and its float32 parameters, split over the mesh's `model` axis.

    `path`: a checkpoint, or a folder of checkpoints or of a run, whose newest is taken.

    Raises:
      CheckpointError: missing, unfinished or damaged.
    """
    path = find_checkpoint(path)
    run = read_run(path)
    model = ModelConfig(**run["model_config"])
    table = parameter_table(model)
    places = sharding.named(mesh, sharding.parameter_specs(table))
    shapes = nest({row.name: row.shape for row in table})
    abstract = jax.tree.map(
        lambda place, shape: jax.ShapeDtypeStruct(shape, "float32", sharding=place),
        places,
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return run, model, read_arrays(path, {"params": abstract}, run)["params"]


def write_weights(path: str | Path, params: Any, run: dict[str, Any]) -> None:
    """A checkpoint that holds weights alone: enough to evaluate, generate, convert.

    Args:
      path: named global_step<N>; its folder is there.
      params: float32, under the names of the parameter table.
      run: the item `run`, but for its version and checksums.
    """
    recorded = {"format_version": FORMAT_VERSION, **run, "checksums": checksums({"params": params})}
    items = {"params": ocp.args.PyTreeSave(params), "run": ocp.args.JsonSave(sealed(recorded))}
    with ocp.Checkpointer(item_handlers()) as writer:
        writer.save(epath.Path(path).resolve(), args=ocp.args.Composite(**items))
