"""The gradient of one batch: split over `replica` and `data`, summed once a step in float32.

`jax.shard_map` over both makes the one reduction explicit: left to the compiler, the sum over
replicas happens in the type of the matrix products (bfloat16) and once a microbatch. The axis
`model` stays with the compiler, but for these collectives: it would gather what they work on.

B rows of the batch, S sources.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from stablelm_jax.model.compute import Compute
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.lora import Lora, map_kernels
from stablelm_jax.model.parameters import parameter_table
from stablelm_jax.model.transformer import Fetch
from stablelm_jax.parallel import sharding
from stablelm_jax.parallel.mesh import BATCH_AXES, sum_over
from stablelm_jax.training.objectives import Objective


def make_gradient_function(
    model: ModelConfig,
    mesh: Mesh,
    *,
    objective: Objective,
    accumulation: int,
    compute: Compute,
    zero1: bool,
    fsdp: bool = False,
    float32_reduce: bool = True,
    lora: Lora | None = None,
) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    """Returns f(params, batch) -> (gradients, sums); with `lora` f(params, batch, frozen).

    Args:
      accumulation: microbatches that each device runs one after another.
      zero1: gradients are split as the master weights are: reduce-scattered over `data`.
      fsdp: each layer is gathered in `compute.dtype` where it is used, and its gradient scattered
        there, once a microbatch. Without it all `params` are gathered first, and gradients are
        reduced once, after the last microbatch.
      float32_reduce: replicas are summed in float32, as the recipe says; else in `compute.dtype`.
      lora: `params` are its adapters, which stay in float32 until they are multiplied; `frozen` are
        all weights, in `compute.dtype`, which `fsdp` splits.

    `params` are the float32 master weights. The gradients are float32, of the objective's loss of
    the whole batch. `sums`: those of the objective over the whole batch, by source, float32 [S].
    """
    table = lora.table(model) if lora else parameter_table(model)
    places = sharding.named(mesh, sharding.parameter_specs(table))
    specs = _specs(sharding.master_specs(table, mesh, zero1))
    weights = _specs(sharding.master_specs(parameter_table(model), mesh, fsdp)) if lora else specs
    reduce_dtype = jnp.float32 if float32_reduce else compute.dtype
    fetch = _make_fetch(weights, compute.dtype, reduce_dtype) if fsdp else None
    is_split = fsdp and not lora  # what is trained; adapters are small

    def local_gradient(params, batch, frozen):
        totals = sum_over(objective.count(batch))
        micro = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)

        def loss(params, rows):
            if lora:
                params = lora.join(frozen, params)
            return objective.loss(model, params, rows, totals, compute=compute, fetch=fetch)

        def reduced(gradient, spec):  # with FSDP this has happened where the weight was fetched
            done = is_split and spec.dim is not None
            return gradient if done else _reduce(gradient, spec, reduce_dtype)

        gradients, sums = _accumulate(jax.grad(loss, has_aux=True), params, micro, accumulation)
        return jax.tree.map(reduced, gradients, specs), sum_over(sums)

    whole, rows = PartitionSpec(), sharding.mesh_axes(["batch"])
    params_specs = _along_data(specs) if is_split else whole
    frozen_specs = _along_data(weights) if lora else whole
    mapped = jax.shard_map(
        local_gradient,
        mesh=mesh,
        in_specs=(params_specs, rows, frozen_specs),
        out_specs=(_along_data(specs), whole),
        axis_names=set(BATCH_AXES),
        check_vma=False,
    )

    def gradient(params, batch, frozen=None):
        if not is_split:
            dtype = jnp.float32 if lora else compute.dtype
            params = sharding.gathered(params, dtype, places)
        return mapped(params, batch, frozen or {})

    return gradient


def _accumulate(gradient, params, micro, accumulation: int):
    """Sum of `gradient` over the microbatches, in float32."""
    if accumulation == 1:
        gradients, sums = gradient(params, jax.tree.map(lambda x: x[0], micro))
        return jax.tree.map(lambda g: g.astype(jnp.float32), gradients), sums

    def add(total, rows):
        new = gradient(params, rows)
        return jax.tree.map(lambda t, n: t + n.astype(jnp.float32), total, new), None

    first = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), first)
    return jax.lax.scan(add, zeros, micro)[0]


def _specs(specs: Any) -> Any:
    """A tree of `_Spec`s."""
    return jax.tree.map(_Spec, specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _along_data(specs: Any) -> Any:
    return jax.tree.map(lambda spec: spec.along("data"), specs)


@dataclasses.dataclass(frozen=True)
class _Spec:
    """How a gradient is split; hashable, and a leaf of a tree."""

    axes: PartitionSpec

    @property
    def dim(self) -> int | None:
        """The dim that is split over `data`, if one is."""
        return sharding.data_dim(self.axes)

    def along(self, axis: str) -> PartitionSpec:
        """The spec with this axis alone."""
        return PartitionSpec(*(axis if a == axis else None for a in self.axes))

    def on_parts(self, function: Callable[[jax.Array], jax.Array]) -> Callable:
        """`function` on what each device of `model` holds of the array."""
        along = self.along("model")
        return jax.shard_map(
            function, in_specs=along, out_specs=along, axis_names={"model"}, check_vma=False
        )


def _reduce(gradient: jax.Array, spec: _Spec, dtype: Any) -> jax.Array:
    """Sum over the batch's axes in `dtype`, float32; scattered as `spec` says.

    Groups of devices scatter first, so that only a part of each gradient goes between groups.
    """

    def reduce(part):
        part, axes = part.astype(dtype), BATCH_AXES
        if spec.dim is not None:
            part = jax.lax.psum_scatter(part, "data", scatter_dimension=spec.dim, tiled=True)
            axes = ("replica",)
        return sum_over(part, axes).astype(jnp.float32)

    return spec.on_parts(reduce)(gradient)


def _make_fetch(specs: Any, dtype: Any, reduce_dtype: Any) -> Fetch:
    """Gathers the parameters of a group in `dtype`; gradients come back summed and scattered."""

    def fetch(group, params):
        def whole(x, spec):
            if spec.dim is None:
                return x.astype(dtype)
            if group == "layers":  # one of them, without their axis
                spec = _Spec(PartitionSpec(*spec.axes[1:]))
            return _gather(x, spec, dtype, reduce_dtype)

        return map_kernels(whole, params, specs[group])

    return fetch


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(x, spec, dtype, reduce_dtype):
    gather = partial(jax.lax.all_gather, axis_name="data", axis=spec.dim, tiled=True)
    return spec.on_parts(gather)(x.astype(dtype))


def _gather_forward(x, spec, dtype, reduce_dtype):
    return _gather(x, spec, dtype, reduce_dtype), None


def _gather_backward(spec, dtype, reduce_dtype, _, gradient):
    return (_reduce(gradient, spec, reduce_dtype),)


_gather.defvjp(_gather_forward, _gather_backward)
