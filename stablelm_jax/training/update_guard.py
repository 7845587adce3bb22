"""The update guard: an update that would harm is left out on the devices themselves.

Nobody waits to see its loss: the step decides, and the host hears of it with the next metrics line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

APPLIED, NOT_FINITE, SPIKE, HELD = 0, 1, 2, 3  # what became of an update
_IN_A_ROW = ("in_a_row", "held")  # the part of the state that a new run or branch forgets
NO_GUARD: Mapping[str, Any] = {"kind": "off", "stop_after": float("inf")}


def new_guard() -> dict[str, jax.Array]:
    """The guard's state before the first step; float32 scalars.

    "mean" and "variance" of the loss over "count" steps; "in_a_row", how many of the last updates
    were left out; "held", 1 once the run is to stop.
    """
    names = ("mean", "variance", "count", *_IN_A_ROW)
    return {name: jnp.zeros((), jnp.float32) for name in names}


def decide(
    before: Mapping[str, jax.Array],
    loss: jax.Array,
    grad_norm: jax.Array,
    guard: Mapping[str, Any],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What becomes of an update (APPLIED, NOT_FINITE, SPIKE, HELD), and the guard's state after it.

    Args:
      before: the guard's state before this update.
      loss, grad_norm: float32 scalars of the update.
      guard: the config's group of that name and `stop_after`: so many updates left out in a row
        hold all later ones back until the host has seen it (HELD).
    """
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
    spike, statistics = is_spike(before, loss, guard)
    skipped = jnp.where(finite, jnp.where(spike, SPIKE, APPLIED), NOT_FINITE)
    skipped = jnp.where(before["held"] > 0, HELD, skipped)
    applied = skipped == APPLIED
    in_a_row = jnp.where(applied, 0.0, before["in_a_row"] + 1)
    stop = in_a_row >= guard["stop_after"]
    if guard["kind"] == "stop":
        stop |= skipped == SPIKE
    after = {name: jnp.where(applied, statistics[name], before[name]) for name in before}
    return skipped, after | {"in_a_row": in_a_row, "held": jnp.where(stop, 1.0, before["held"])}


def is_spike(
    statistics: Mapping[str, jax.Array], loss: jax.Array, guard: Mapping[str, Any]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Whether a loss is a spike by what was before it, and the statistics with this loss in them.

    Mean and variance are running ones: over all steps up to `guard.window`, from there on each
    step weighs 1 / window and the older ones fade.
    """
    if guard["kind"] == "off":
        return jnp.bool_(False), dict(statistics)
    mean, variance, count = (statistics[key] for key in ("mean", "variance", "count"))
    far = loss > mean + guard["sigmas"] * jnp.sqrt(variance)
    share = 1 / jnp.minimum(count + 1, guard["window"])
    delta = loss - mean
    with_this = statistics | {
        "mean": mean + share * delta,
        "variance": (1 - share) * (variance + share * delta * delta),
        "count": count + 1,
    }
    return far & (count >= guard["window"]), with_this


def without_row(guard: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The guard's state of one that begins here: no update was left out as yet."""
    fresh = {name: jax.device_put(np.float32(0), guard[name].sharding) for name in _IN_A_ROW}
    return guard | fresh


def guard_to_json(guard: Mapping[str, jax.Array]) -> dict[str, float]:
    """The guard's state as JSON values; float32 in JSON is exact."""
    return {name: float(value) for name, value in jax.device_get(dict(guard)).items()}
