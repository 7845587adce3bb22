"""What a training step carries from one to the next."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import parameter_table
from stablelm_jax.model.transformer import init_params
from stablelm_jax.parallel import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """One pytree, donated to every step.

    Attributes:
      step: int32 scalar, updates attempted so far; also the index of the next batch.
      updates_skipped: int32 scalar, updates left out (see step.py).
      params: float32 master weights under the names of the parameter table.
      opt_state: optax state; its moments have the shapes and shardings of `params`.
      guard: running statistics of the loss, as `new_guard` makes them.
    """

    step: jax.Array
    updates_skipped: jax.Array
    params: Any
    opt_state: Any
    guard: Any


def new_guard() -> dict[str, jax.Array]:
    """Nothing seen yet; float32 scalars.

    "mean" and "variance" of the loss and of how many steps, "count"; "in_a_row", updates left out
    without one between them; "held", 1 once the run is to stop.
    """
    names = ("mean", "variance", "count", "in_a_row", "held")
    return {name: jnp.zeros((), jnp.float32) for name in names}


def abstract_state(
    model: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, zero1: bool
) -> TrainState:
    """The state as `ShapeDtypeStruct`s with their shardings; nothing is allocated."""
    masters = sharding.named(mesh, sharding.master_specs(parameter_table(model), mesh, zero1))
    shapes = jax.eval_shape(lambda: _new_state(model, optimizer, jax.random.key(0)))
    everywhere = sharding.replicated(mesh)
    placed = TrainState(
        step=everywhere,
        updates_skipped=everywhere,
        params=masters,
        opt_state=optax.tree_map_params(
            optimizer,
            lambda _, place: place,
            shapes.opt_state,
            masters,
            transform_non_params=lambda _: everywhere,
        ),
        guard=jax.tree.map(lambda _: everywhere, shapes.guard),
    )
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, placed
    )


def shardings_of(abstract: Any) -> Any:
    """The shardings of a tree of `ShapeDtypeStruct`s or arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def init_state(
    model: ModelConfig, optimizer: optax.GradientTransformation, abstract: TrainState, seed: int
) -> TrainState:
    """A fresh state, made in place on its devices: no host ever holds the whole of it."""
    make = jax.jit(
        lambda key: _new_state(model, optimizer, key), out_shardings=shardings_of(abstract)
    )
    return make(jax.random.key(seed))


def _new_state(model: ModelConfig, optimizer: optax.GradientTransformation, key: jax.Array):
    params = init_params(model, key)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        updates_skipped=zero,
        params=params,
        opt_state=optimizer.init(params),
        guard=new_guard(),
    )
