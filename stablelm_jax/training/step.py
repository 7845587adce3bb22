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
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    update = (on_cpu and optimizer.in_place) or _update_of(optimizer)

    def train_step(state: TrainState, batch: Batch):
        weights = optimizer.gradient_at(state.params, state.opt_state)
        gradients, sums = gradient(weights, batch, state.frozen)
        grad_norm = optax.tree.norm(gradients)
        loss = mean_loss(objective, sums)
        skipped, guard_after = update_guard.decide(state.guard, loss, grad_norm, guard)
        good = skipped == update_guard.APPLIED
        params, opt_state = update(gradients, grad_norm, state.opt_state, state.params, good)
        new = TrainState(
            step=state.step + 1,
            updates_skipped=state.updates_skipped + jnp.where(good, 0, 1),
            params=params,
            opt_state=opt_state,
            guard=dict(guard_after),
            frozen=state.frozen,
        )
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


def _update_of(optimizer: Optimizer) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """One update in the form of `Optimizer.in_place`."""

    def update(gradients, norm, state, params, good):
        updates, new_state = optimizer.update(gradients, state, params)
        new = optax.apply_updates(params, updates), new_state
        return jax.tree.map(lambda new, old: jnp.where(good, new, old), new, (params, state))

    return update
