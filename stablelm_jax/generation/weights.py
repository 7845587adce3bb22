"""The copy of the weights that decoding reads: cast once, layer by layer, never per token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import parameter_table
from stablelm_jax.parallel import sharding


def decode_weights(
    model: ModelConfig, mesh: Mesh, dtype: jnp.dtype
) -> tuple[Callable[[Any], Any], Any]:
    """Jitted f(params) -> weights, and their shardings.

    The weights are the parameters in `dtype`, with a list of trees, one a layer, in the place of
    the stacked layers; they are split over `model` of the mesh alone.

    Raises:
      ValueError: key heads that `model` of the mesh does not divide.
    """
    check_split(model.num_kv_heads, mesh.shape["model"])
    specs = sharding.parameter_specs(parameter_table(model))
    one_layer = jax.tree.map(
        lambda spec: PartitionSpec(*spec[1:]),
        specs["layers"],
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    numbers = range(model.num_layers)
    places = sharding.named(mesh, specs | {"layers": [one_layer for _ in numbers]})

    def copy(params):
        layers = [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in numbers]
        return sharding.gathered(params | {"layers": layers}, dtype, places)

    return jax.jit(copy, out_shardings=places), places


def check_split(num_kv_heads: int, devices: int) -> None:
    """Raises ValueError where so many devices cannot each have whole key heads."""
    if num_kv_heads % devices:
        raise ValueError(
            f"{num_kv_heads} key heads cannot be split over {devices} devices: "
            "let as many share the model as divide them"
        )
