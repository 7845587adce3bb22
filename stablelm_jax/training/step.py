"""The jitted train step: gather, gradient, clip and update, norms.

An update that would harm is left out on the devices themselves: nobody waits to see its loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

APPLIED, NOT_FINITE, SPIKE, HELD = 0, 1, 2, 3  # what became of an update
NO_GUARD: Mapping[str, Any] = {"kind": "off", "stop_after": float("inf")}

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
    guard: Mapping[str, Any] = NO_GUARD,
    **gradient_options: Any,
) -> StepFunction:
    """Compiles-on-first-call `step(state, batch) -> (state, metrics)`; `state` is donated.

    `guard` is that group of a config, and `stop_after`: so many updates left out in a row hold all
    later ones back until the host has seen it (HELD). `gradient_options` are those of
    `make_gradient_function`. The metrics are "nll" and "tokens", float32 [S] by source, and those
    of `step_metrics`; every device holds all of them.
    """
    table = parameter_table(model)
    compute_shardings = sharding.named(mesh, sharding.parameter_specs(table))
    masters = sharding.master_specs(table, mesh, zero1)
    gradient = make_gradient_function(
        model, mesh, masters, dtype=dtype, fsdp=fsdp, **gradient_options
    )

    def train_step(state: TrainState, batch: Batch):
        params = state.params if fsdp else sharding.gathered(state.params, dtype, compute_shardings)
        gradients, sums = gradient(params, batch)
        grad_norm = optax.tree.norm(gradients)
        loss = jnp.sum(sums["nll"]) / jnp.sum(sums["tokens"])
        skipped, after = decided(state.guard, loss, grad_norm, guard)
        new = _update(optimizer, state, gradients, after, skipped == APPLIED)
        return new, sums | step_metrics(state, new, grad_norm, skipped, schedule)

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings_of(abstract), sharding.replicated(mesh)),
    )


def step_metrics(
    old: TrainState,
    new: TrainState,
    grad_norm: jax.Array,
    skipped: jax.Array,
    schedule: optax.Schedule,
) -> dict[str, jax.Array]:
    """Scalars that tell of the update from the state `old` to `new`.

    Float32: "grad_norm" before clipping, "param_norm", "learning_rate" of the update. Int32:
    "skipped", APPLIED or why it was left out, and "updates_skipped", how many were so far.
    """
    return {
        "grad_norm": grad_norm,
        "param_norm": optax.tree.norm(new.params),
        "learning_rate": schedule(optax.tree_utils.tree_get(old.opt_state, "count")),
        "skipped": skipped,
        "updates_skipped": new.updates_skipped,
    }


def decided(
    before: Mapping[str, jax.Array],
    loss: jax.Array,
    grad_norm: jax.Array,
    guard: Mapping[str, Any],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What becomes of an update (APPLIED, NOT_FINITE, SPIKE, HELD), and the guard's state after it.

    `before`: that state before it, of float32 scalars; `loss`, `grad_norm`: of the update.
    """
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
    spike, statistics = judged(before, loss, guard)
    skipped = jnp.where(finite, jnp.where(spike, SPIKE, APPLIED), NOT_FINITE)
    skipped = jnp.where(before["held"] > 0, HELD, skipped)
    applied = skipped == APPLIED
    in_a_row = jnp.where(applied, 0.0, before["in_a_row"] + 1)
    stop = in_a_row >= guard["stop_after"]
    if guard["kind"] == "stop":
        stop |= skipped == SPIKE
    after = {name: jnp.where(applied, statistics[name], before[name]) for name in before}
    return skipped, after | {"in_a_row": in_a_row, "held": jnp.where(stop, 1.0, before["held"])}


def judged(
    statistics: Mapping[str, jax.Array], loss: jax.Array, guard: Mapping[str, Any]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Whether a loss is a spike by what was before it, and the statistics with it taken in.

    Mean and variance are running ones: over all steps up to `guard.window`, from there on each
    step weighs 1 / window and the older ones fade.
    """
    if guard["kind"] == "off":
        return jnp.bool_(False), dict(statistics)
    mean, variance, count = (statistics[key] for key in ("mean", "variance", "count"))
    far = loss > mean + guard["sigmas"] * jnp.sqrt(variance)
    share = 1 / jnp.minimum(count + 1, guard["window"])
    delta = loss - mean
    taken_in = statistics | {
        "mean": mean + share * delta,
        "variance": (1 - share) * (variance + share * delta * delta),
        "count": count + 1,
    }
    return far & (count >= guard["window"]), taken_in


def _update(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    gradients: Any,
    guard: Mapping[str, jax.Array],
    good: jax.Array,
) -> TrainState:
    """One optimizer update; weights and moments stay as they are unless `good`.

    `guard`: its state after this step.
    """
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = lambda new, old: jnp.where(good, new, old)  # noqa: E731
    return TrainState(
        step=state.step + 1,
        updates_skipped=state.updates_skipped + jnp.where(good, 0, 1),
        params=jax.tree.map(keep, params, state.params),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        guard=dict(guard),
    )
