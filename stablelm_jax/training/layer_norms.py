"""How large the gradients and the activations of each layer are.

A program of its own beside the train step, which stays what it is. B rows, T sequence length, D
width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from stablelm_jax.model.compute import Compute
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.lora import Lora
from stablelm_jax.model.loss import Batch
from stablelm_jax.model.parameters import parameter_table
from stablelm_jax.model.transformer import hidden_states
from stablelm_jax.optimizer.parts import Optimizer
from stablelm_jax.parallel import sharding
from stablelm_jax.parallel.mesh import sum_over
from stablelm_jax.training.gradient import make_gradient_function
from stablelm_jax.training.objectives import Objective
from stablelm_jax.training.state import TrainState

LayerNorms = Callable[[TrainState, Batch], dict[str, jax.Array]]


def make_layer_norms(
    model: ModelConfig,
    mesh: Mesh,
    *,
    optimizer: Optimizer,
    objective: Objective,
    accumulation: int,
    compute: Compute,
    lora: Lora | None = None,
    **gradient_options: Any,
) -> LayerNorms:
    """Jitted f(state, batch) -> metrics of the whole batch, float32 scalars on every device.

    "grad_norm/layer<i>", i from 0, and "grad_norm/embed", "final_norm", "head": norms of these
    parts of the gradient, before clipping. "activation_norm/layer<i>": the root mean square of the
    residual stream after a layer, over all B x T x D.
    """
    options = dict(objective=objective, accumulation=accumulation, compute=compute, lora=lora)
    gradient = make_gradient_function(model, mesh, **options, **gradient_options)
    places = sharding.named(mesh, sharding.parameter_specs(parameter_table(model)))

    def local_mean_squares(params, batch):
        def of_rows(rows):
            inputs_BT = rows["tokens"], rows["segment_ids"], rows["positions"]
            options = dict(compute=compute.forward_only(), watch=_mean_square)
            return hidden_states(model, params, *inputs_BT, **options)[1]

        micro = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)
        return sum_over(jnp.mean(jax.lax.map(of_rows, micro), axis=0)) / sharding.batch_parts(mesh)

    mean_squares = sharding.map_rows(local_mean_squares, mesh, out_specs=PartitionSpec())

    def layer_norms(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        at = optimizer.gradient_at(state.params, state.opt_state)
        gradients, _ = gradient(at, batch, state.frozen)
        weights = lora.join(state.frozen, at) if lora else at
        squares_L = mean_squares(sharding.gathered(weights, compute.dtype, places), batch)
        norms_L = jax.vmap(optax.tree.norm)(gradients.pop("layers"))
        found = {f"grad_norm/{group}": optax.tree.norm(part) for group, part in gradients.items()}
        for i, (norm, square) in enumerate(zip(norms_L, squares_L)):
            found |= {f"grad_norm/layer{i}": norm, f"activation_norm/layer{i}": jnp.sqrt(square)}
        return found

    return jax.jit(layer_norms, out_shardings=sharding.replicated(mesh))


def _mean_square(x_BTD: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(x_BTD.astype(jnp.float32)))
