"""The copy of the weights that decoding reads: cast once, layer by layer, never per token."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from stablelm_jax.generation.quantisation import METHODS, Quantised, quantised, quantised_spec
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import ParameterSpec, nest, parameter_table
from stablelm_jax.parallel import sharding


def decode_weights(
    model: ModelConfig, mesh: Mesh, dtype: jnp.dtype, method: str | None = None
) -> tuple[Callable[[Any], Any], Any]:
    """Jitted f(params) -> weights, and their shardings.

    Weights are {"embed", "layers": [one tree a layer], "final_norm", "head"} in `dtype`, split over
    `model` of the mesh wherever the parameters lie. With `method` ('int8', 'int4') the matrices are
    `Quantised`, but for the embedding, which is only looked up.

    Raises:
      ValueError: an unknown method, or heads that `model` of the mesh does not divide.
    """
    if method is not None and method not in METHODS:
        raise ValueError(f"weights {method!r} are unknown: choose one of {', '.join(METHODS)}")
    check_split(model.num_kv_heads, mesh.shape["model"])
    table = parameter_table(model)
    by_layer = [row for row in table if row.stacked]
    others = [row for row in table if not row.stacked]

    def tree(leaf_of, rows):
        return nest({row.name.removeprefix("layers/"): leaf_of(row) for row in rows})

    def copy(params):
        def held(row, layer=None):
            x = functools.reduce(operator.getitem, row.name.split("/"), params)
            return _held(row, x if layer is None else x[layer], mesh, dtype, method)

        numbers = range(model.num_layers)
        layers = [tree(functools.partial(held, layer=i), by_layer) for i in numbers]
        return tree(held, others) | {"layers": layers}

    place = functools.partial(_place, mesh=mesh, method=method)
    places = tree(place, others) | {"layers": [tree(place, by_layer)] * model.num_layers}
    return jax.jit(copy, out_shardings=places), places


def rounded(model: ModelConfig, params: Any, method: str) -> Any:
    """The float32 parameters that the copy with `method` stands for on one device, as `params`."""

    def leaf(row):
        x = functools.reduce(operator.getitem, row.name.split("/"), params)
        if not _is_matrix(row):
            return x
        round_one = lambda x: quantised(x, method, _num_in(row)).matrix()  # noqa: E731
        return jax.lax.map(round_one, x) if row.stacked else round_one(x)

    return nest({row.name: leaf(row) for row in parameter_table(model)})


def check_split(num_kv_heads: int, devices: int) -> None:
    """Raises ValueError where so many devices cannot each have whole key heads."""
    if num_kv_heads % devices:
        raise ValueError(
            f"{num_kv_heads} key heads cannot be split over {devices} devices: "
            "let as many share the model as divide them"
        )


def _held(row: ParameterSpec, x: jax.Array, mesh: Mesh, dtype: jnp.dtype, method: str | None):
    """A parameter as the copy has it, gathered from the masters that ZeRO-1 splits over `data`."""
    spec, place = _spec(row), sharding.named(mesh, _spec(row))
    if method is None or not _is_matrix(row):
        return sharding.gathered(x, dtype, place)
    parts = 1 if spec[0] is None else mesh.shape[spec[0]]
    whole = sharding.gathered(x, jnp.float32, place)
    return quantised(whole, method, _num_in(row), parts)


def _place(row: ParameterSpec, mesh: Mesh, method: str | None) -> Any:
    if method is None or not _is_matrix(row):
        return sharding.named(mesh, _spec(row))
    values, scale = sharding.named(mesh, list(quantised_spec(_spec(row), method, _num_in(row))))
    return Quantised(values, scale, row.shape[1:] if row.stacked else row.shape)


def _spec(row: ParameterSpec) -> PartitionSpec:
    """Of one layer where the parameter is stacked."""
    return sharding.mesh_axes(row.axes[1:] if row.stacked else row.axes)


def _is_matrix(row: ParameterSpec) -> bool:
    return row.name.endswith("/kernel")


def _num_in(row: ParameterSpec) -> int:
    """Input dims of a matrix: attention's last reads heads and their dims."""
    return 2 if row.name.endswith("/out/kernel") else 1
