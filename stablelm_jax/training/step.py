"""The jitted train step: gather, gradient, clip and update, norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.loss import Batch
from stablelm_jax.optimizer.parts import Optimizer
from stablelm_jax.parallel import sharding
from stablelm_jax.training import update_guard
from stablelm_jax.training.gradient import make_gradient_function
from stablelm_jax.training.objectives import Objective, mean_loss
from stablelm_jax.training.state import TrainState, shardings_of

StepFunction = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    model: ModelConfig,
    optimizer: Optimizer,
    schedule: optax.Schedule,
    mesh: Mesh,
    abstract: TrainState,
    *,
    objective: Objective,
    guard: Mapping[str, Any] = update_guard.NO_GUARD,
    **gradient_options: Any,
) -> StepFunction:
    """Compiles-on-first-call `step(state, batch) -> (state, metrics)`; `state` is donated.

    `guard` is that of `update_guard.decide`, `gradient_options` are those of
    `make_gradient_function`.

    The metrics, which every device holds whole. The objective's sums by source, float32 [S].
    Float32 scalars: "grad_norm" before clipping, "param_norm", "learning_rate" of the update. Int32
    scalars: "skipped", APPLIED or why the update was left out; "updates_skipped", how many so far.
    """
    gradient = make_gradient_function(model, mesh, objective=objective, **gradient_options)

    def train_step(state: TrainState, batch: Batch):
        weights = optimizer.gradient_at(state.params, state.opt_state)
        gradients, sums = gradient(weights, batch, state.frozen)
        grad_norm = optax.tree.norm(gradients)
        loss = mean_loss(objective, sums)
        skipped, guard_after = update_guard.decide(state.guard, loss, grad_norm, guard)
        new = _update(optimizer, state, gradients, guard_after, skipped == update_guard.APPLIED)
        return new, {
            **sums,
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(new.params),
            "learning_rate": schedule(state.opt_state["count"]),
            "skipped": skipped,
            "updates_skipped": new.updates_skipped,
        }

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings_of(abstract), sharding.replicated(mesh)),
    )


def _update(
    optimizer: Optimizer,
    state: TrainState,
    gradients: Any,
    guard_after: Mapping[str, jax.Array],
    good: jax.Array,
) -> TrainState:
    """One optimizer update; weights and moments stay as they are unless `good`."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = lambda new, old: jnp.where(good, new, old)  # noqa: E731
    return TrainState(
        step=state.step + 1,
        updates_skipped=state.updates_skipped + jnp.where(good, 0, 1),
        params=jax.tree.map(keep, params, state.params),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        guard=dict(guard_after),
        frozen=state.frozen,
    )
