"""The gradient of one batch: split over `data`, summed once a step in float32.

`jax.shard_map` over `data` makes the one reduction explicit: left to the compiler, the sum over
replicas happens in the type of the matrix products (bfloat16) and once a microbatch. The axis
`model` stays with the compiler.

B rows of the batch, T sequence length, S sources.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.loss import Batch, sums_by_source, token_losses
from stablelm_jax.parallel import sharding


def make_gradient_function(
    model: ModelConfig,
    mesh: Mesh,
    gradient_specs: Any,
    *,
    num_sources: int,
    accumulation: int,
    dtype: Any,
    remat: str,
    attention: str,
) -> Callable[[Any, Batch], tuple[Any, dict[str, jax.Array]]]:
    """Returns f(params, batch) -> (gradients, sums).

    Args:
      gradient_specs: spec of each gradient; a leaf split over `data` is reduce-scattered.
      accumulation: microbatches that each device runs one after another.

    The gradients are float32, of the mean loss over the counted tokens of the whole batch.
    `sums`: "nll" and "tokens", float32 [S], over the whole batch, by source.
    """

    def local_gradient(params, batch):
        tokens = jax.lax.psum(jnp.sum(batch["loss_mask"]), "data")
        micro = jax.tree.map(lambda x: _split(x, accumulation), batch)

        def loss(params, rows):
            nll_BT = token_losses(
                model, params, rows, dtype=dtype, remat=remat, attention=attention
            )
            sums = {
                "nll": sums_by_source(nll_BT, rows["source_ids"], num_sources),
                "tokens": sums_by_source(rows["loss_mask"], rows["source_ids"], num_sources),
            }
            return jnp.sum(nll_BT) / tokens, sums

        gradients, sums = _accumulate(jax.grad(loss, has_aux=True), params, micro, accumulation)
        return jax.tree.map(_reduce, gradients, scatter_dims), jax.lax.psum(sums, "data")

    scatter_dims, scatter_specs = _reduction_plan(gradient_specs)
    return jax.shard_map(
        local_gradient,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=(scatter_specs, PartitionSpec()),
        axis_names={"data"},
        check_vma=False,
    )


def _split(x: jax.Array, accumulation: int) -> jax.Array:
    return x.reshape(accumulation, x.shape[0] // accumulation, *x.shape[1:])


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


def _reduction_plan(specs: Any) -> tuple[Any, Any]:
    """For each gradient the dim to scatter over `data` (-1: sum everywhere), and its spec."""
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731

    def dim_of(spec):
        dim = sharding.data_dim(spec)
        return -1 if dim is None else dim

    def only_data(spec):
        return PartitionSpec(*("data" if axis == "data" else None for axis in spec))

    return (
        jax.tree.map(dim_of, specs, is_leaf=is_spec),
        jax.tree.map(only_data, specs, is_leaf=is_spec),
    )


def _reduce(gradient: jax.Array, dim: int) -> jax.Array:
    if dim < 0:
        return jax.lax.psum(gradient, "data")
    return jax.lax.psum_scatter(gradient, "data", scatter_dimension=dim, tiled=True)
