"""The jitted train step: gather, gradient, clip and update, norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.loss import Batch
from stablelm_jax.model.parameters import parameter_table
from stablelm_jax.parallel import sharding
from stablelm_jax.training.gradient import make_gradient_function
from stablelm_jax.training.state import TrainState, shardings_of

StepFunction = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    abstract: TrainState,
    *,
    zero1: bool,
    dtype: Any,
    fsdp: bool = False,
    **gradient_options: Any,
) -> StepFunction:
    """Compiles-on-first-call `step(state, batch) -> (state, metrics)`; `state` is donated.

    `gradient_options` are those of `make_gradient_function`.

    Metrics, all float32 on every device: "nll" and "tokens" [S] by source, "grad_norm" before
    clipping, "param_norm", "learning_rate" of this update; "updates_skipped" int32.
    """
    table = parameter_table(model)
    compute_shardings = sharding.named(mesh, sharding.parameter_specs(table))
    gradient = make_gradient_function(
        model,
        mesh,
        sharding.master_specs(table, mesh, zero1),
        dtype=dtype,
        fsdp=fsdp,
        **gradient_options,
    )

    def train_step(state: TrainState, batch: Batch):
        params = state.params if fsdp else sharding.gathered(state.params, dtype, compute_shardings)
        gradients, sums = gradient(params, batch)
        grad_norm = optax.tree.norm(gradients)
        new, skipped = _update(optimizer, state, gradients, jnp.isfinite(grad_norm))
        metrics = sums | {
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(new.params),
            "learning_rate": schedule(optax.tree_utils.tree_get(state.opt_state, "count")),
            "updates_skipped": skipped,
        }
        return new, metrics

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings_of(abstract), sharding.replicated(mesh)),
    )


def _update(
    optimizer: optax.GradientTransformation, state: TrainState, gradients: Any, finite: jax.Array
) -> tuple[TrainState, jax.Array]:
    """One optimizer update; weights, moments and count stay as they are unless `finite`."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
    skipped = state.updates_skipped + jnp.where(finite, 0, 1)
    new = TrainState(
        step=state.step + 1,
        updates_skipped=skipped,
        params=jax.tree.map(keep, params, state.params),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
    )
    return new, skipped
