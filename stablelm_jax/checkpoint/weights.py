"""The weights of a checkpoint, for the verbs that only use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from stablelm_jax.checkpoint.reading import read_arrays, read_run
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import nest, parameter_table
from stablelm_jax.parallel import sharding


def load_weights(path: str | Path, mesh: Mesh) -> tuple[dict[str, Any], ModelConfig, Any]:
    """The item `run`, the model and its float32 parameters, split over the mesh's `model` axis.

    Raises:
      CheckpointError: missing, unfinished or damaged.
    """
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
