"""What a training step carries from one to the next."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.lora import Lora
from stablelm_jax.model.parameters import nest, parameter_table
from stablelm_jax.model.transformer import init_params
from stablelm_jax.optimizer.parts import Optimizer
from stablelm_jax.parallel import sharding
from stablelm_jax.training.update_guard import new_guard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """One pytree, donated to every step."""

    step: jax.Array  # int32 scalar, updates attempted so far; also the index of the next batch
    updates_skipped: jax.Array  # int32 scalar, updates that the update guard left out
    # Float32: all weights under the names of the parameter table, or adapters (model/lora.py).
    params: Any
    opt_state: dict[str, Any]  # `Optimizer`'s; its trees have the shapes and shardings of `params`
    guard: Any  # of the update guard, as `new_guard` makes it
    # Under adapters the weights that they are added to, in the compute type.
    frozen: Any = dataclasses.field(default_factory=dict)

    @property
    def base(self) -> Any:
        """All weights that a forward pass begins with: adapters are yet to be added."""
        return self.frozen or self.params


def abstract_state(
    model: ModelConfig,
    optimizer: Optimizer,
    mesh: Mesh,
    zero1: bool,
    lora: Lora | None = None,
    frozen: Any = None,
) -> TrainState:
    """The state as `ShapeDtypeStruct`s with their shardings; nothing is allocated.

    `frozen`: of `lora`, as `abstract_frozen` gives it.
    """
    table = lora.table(model) if lora else parameter_table(model)
    masters = sharding.named(mesh, sharding.master_specs(table, mesh, zero1))
    init = lora.init if lora else init_params
    shapes = jax.eval_shape(lambda: _new_state(optimizer, init(model, jax.random.key(0))))
    everywhere = sharding.replicated(mesh)
    placed = TrainState(
        step=everywhere,
        updates_skipped=everywhere,
        params=masters,
        opt_state={
            name: _placed_as(masters, part) if isinstance(part, dict) else everywhere
            for name, part in shapes.opt_state.items()
        },
        guard=jax.tree.map(lambda _: everywhere, shapes.guard),
    )
    abstract = jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, placed
    )
    return dataclasses.replace(abstract, frozen=frozen or {})


def _placed_as(places: Any, part: Any) -> Any:
    """The places of a tree that has some of the branches that `places` has."""
    if not isinstance(part, dict):
        return places
    return {name: _placed_as(places[name], branch) for name, branch in part.items()}


def abstract_frozen(model: ModelConfig, mesh: Mesh, dtype: Any, fsdp: bool) -> Any:
    """The weights under adapters: whole but for the axis `model`, or with `fsdp` split further."""

    def place(row):
        spec = sharding.master_spec(row, mesh.shape, fsdp)
        return jax.ShapeDtypeStruct(row.shape, dtype, sharding=sharding.named(mesh, spec))

    return nest({row.name: place(row) for row in parameter_table(model)})


def shardings_of(abstract: Any) -> Any:
    """The shardings of a tree of `ShapeDtypeStruct`s or arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def init_state(
    model: ModelConfig,
    optimizer: Optimizer,
    abstract: TrainState,
    seed: int,
    lora: Lora | None = None,
    frozen: Any = None,
) -> TrainState:
    """A fresh state, made in place on its devices: no host ever holds the whole of it.

    `lora`: its adapters, on the weights `frozen`.
    """
    init = lora.init if lora else init_params
    make = jax.jit(
        lambda key: _new_state(optimizer, init(model, key)),
        out_shardings=shardings_of(dataclasses.replace(abstract, frozen={})),
    )
    return dataclasses.replace(make(jax.random.key(seed)), frozen=frozen or {})


def state_of_weights(optimizer: Optimizer, abstract: TrainState, params: Any) -> TrainState:
    """The state of a run that begins with these weights, placed as `abstract` says."""
    others = dataclasses.replace(abstract, params=None)
    make = jax.jit(
        lambda params: dataclasses.replace(_new_state(optimizer, params), params=None),
        out_shardings=shardings_of(others),
    )
    return dataclasses.replace(make(params), params=params)


def _new_state(optimizer: Optimizer, params: Any) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        updates_skipped=zero,
        params=params,
        opt_state=optimizer.init(params),
        guard=new_guard(),
    )


def stored_arrays(state: TrainState) -> dict[str, Any]:
    """The items `params` and `optimizer` of a checkpoint of `state`, which may be abstract.

    Plain trees: Adam's moments are `m` and `v` under the parameters' names.
    """
    optimizer = state.opt_state | {"updates_skipped": state.updates_skipped}
    return {"params": state.params, "optimizer": optimizer}


def from_arrays(arrays: dict[str, Any], step: jax.Array, guard: dict[str, jax.Array]) -> TrainState:
    """The state whose `stored_arrays` these are; what is frozen is not among them."""
    opt_state = dict(arrays["optimizer"])
    skipped = opt_state.pop("updates_skipped")
    return TrainState(step, skipped, arrays["params"], opt_state, guard)
