"""The optimizers that `optimizer.kind` names: AdamW as published, and others to compare with it.

Each follows `decoupled` (optimizer/parts.py), which clips, decays and multiplies by the learning
rate; below is what it does between. Numbers are the fields of a config's group `optimizer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from stablelm_jax.model.parameters import ParameterSpec
from stablelm_jax.optimizer.muon import call_here, scale_by_muon
from stablelm_jax.optimizer.parts import Optimizer, decay_mask, decoupled, with_named_state


def make_optimizer(
    settings: Any,
    schedule: optax.Schedule,
    table: Iterable[ParameterSpec],
    *,
    on_whole_layers: Callable = call_here,
) -> Optimizer:
    """What a config's group `optimizer` (any object with its fields) describes.

    `table`: of what is trained. `on_whole_layers`: of `scale_by_muon`.
    """
    mask, adam = decay_mask(table), {name: settings[name] for name in ("b1", "b2", "epsilon")}
    shared = {name: settings[name] for name in ("weight_decay", "clip_norm")}
    if settings.kind == "adamw":
        return adamw(schedule, mask, **adam, **shared)
    if settings.kind == "schedule_free_adamw":
        return schedule_free_adamw(schedule, mask, **adam, **shared)
    if settings.kind == "muon":
        own = {name: settings[f"muon_{name}"] for name in ("momentum", "steps", "scale")}
        direction = scale_by_muon(table, **own, **adam, on_whole_layers=on_whole_layers)
    elif settings.kind == "lion":
        direction = with_named_state(optax.scale_by_lion(settings.lion_b1, settings.lion_b2))
    else:
        own = {name: settings[f"ademamix_{name}"] for name in ("b3", "alpha", "warmup_steps")}
        direction = scale_by_ademamix(**adam, **own)
    return decoupled(direction, schedule, mask, **shared)


def adamw(
    schedule: optax.Schedule, mask: Any, *, b1: float, b2: float, epsilon: float, **shared: float
) -> Optimizer:
    """AdamW as Stable LM 2 was trained with it: Adam with bias correction.

        p <- p - schedule(count) * (m^ / (sqrt(v^) + epsilon) + weight_decay * mask * p)

    `shared`: weight_decay and clip_norm of `decoupled`. The state: "m", "v", "count".

    Source: Stable LM 2's published configs (betas, epsilon, clip, decay) and GPT-NeoX, which
    decays all but norms and biases.
    """
    direction = with_named_state(optax.scale_by_adam(b1, b2, epsilon))
    in_place = _adamw_in_place(schedule, mask, b1, b2, epsilon, **shared)
    return decoupled(direction, schedule, mask, **shared)._replace(in_place=in_place)


def _adamw_in_place(
    schedule: optax.Schedule,
    mask: Any,
    b1: float,
    b2: float,
    epsilon: float,
    weight_decay: float,
    clip_norm: float,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """`Optimizer.in_place` of AdamW: moments first, then the weights from what is stored of them.

    XLA:CPU writes one array in each of its loops. Left to itself it computes new moments twice, in
    the loop of the weights too, and for that copies all old ones at each step. It fuses nothing
    across the border of a condition.
    """

    def update(gradients, norm, state, params, good):
        scale, rate = jnp.minimum(1, clip_norm / norm), schedule(state["count"])

        def average(share, of):
            return lambda old, g: share * old + (1 - share) * of(scale * g)

        def moments(old):
            m = jax.tree.map(average(b1, lambda g: g), old["m"], gradients)
            v = jax.tree.map(average(b2, jnp.square), old["v"], gradients)
            return {"m": m, "v": v, "count": optax.safe_increment(old["count"])}

        def moved(p, m, v, decays):
            step = m / m_weight / (jnp.sqrt(v / v_weight) + epsilon)
            return p - rate * (step + weight_decay * p if decays else step)

        keep = lambda old: old  # noqa: E731
        state = jax.lax.cond(good, moments, keep, state)
        m_weight, v_weight = (1 - b ** state["count"] for b in (b1, b2))
        move = lambda old: jax.tree.map(moved, old, state["m"], state["v"], mask)  # noqa: E731
        return jax.lax.cond(good, move, keep, params), state

    return update


def scale_by_ademamix(
    *, b1: float, b2: float, epsilon: float, b3: float, alpha: float, warmup_steps: int
) -> optax.GradientTransformation:
    """AdEMAMix: Adam with a second, slow average of the gradient, alpha times as heavy.

        u <- (m^ + alpha * m_slow) / (sqrt(v^) + epsilon)

    Over `warmup_steps` updates alpha rises linearly from 0, and the slow average's half-life
    linearly from that of b1 to that of b3. The state: "m", "m_slow", "v", "count".

    Source: Pagliardini et al. 2024, arXiv 2409.03137; there the warmup is the whole run.
    """
    fast, slow = math.log(max(b1, 1e-8)), math.log(b3)

    def risen(count: jax.Array) -> jax.Array:
        return jnp.minimum((count + 1) / max(warmup_steps, 1), 1)

    def b3_of(count: jax.Array) -> jax.Array:
        share = risen(count)
        return jnp.exp(fast * slow / ((1 - share) * slow + share * fast))

    def alpha_of(count: jax.Array) -> jax.Array:
        return alpha * risen(count)

    made = optax.contrib.scale_by_ademamix(b1, b2, b3_of, alpha_of, epsilon)
    return with_named_state(made)


def schedule_free_adamw(
    schedule: optax.Schedule, mask: Any, *, b1: float, b2: float, epsilon: float, **shared: float
) -> Optimizer:
    """Schedule-free AdamW: instead of a falling learning rate, an average of the weights.

        y <- b1 * x + (1 - b1) * z                           where the gradient g is taken
        z <- z - rate * (g / (sqrt(v^) + epsilon) + weight_decay * mask * y)
        x <- x + rate_max^2 / (sum of rate_max^2 so far) * (z - x)

    rate = schedule(count), best constant after its warmup, rate_max the largest so far. The params
    are the average x, which all but the gradient uses: evaluation, samples, checkpoints. The state:
    "z", "v", "count", "max_learning_rate", "weight_sum".

    Source: Defazio et al. 2024, arXiv 2405.15682, and their code. The same iterates as
    optax.contrib's, which keeps y instead of x, from which x comes back with a rounding error, and
    asks the schedule for the averaging's learning rate one count ahead.
    """
    scale = optax.scale_by_rms(b2, epsilon, eps_in_sqrt=False, bias_correction=True)
    adam = decoupled(with_named_state(scale), schedule, mask, **shared)

    def gradient_at(params: Any, state: dict[str, Any]) -> Any:
        return jax.tree.map(lambda x, z: b1 * x + (1 - b1) * z, params, state["z"])

    def init(params: Any) -> dict[str, Any]:
        zeros = {name: jnp.zeros((), jnp.float32) for name in ("max_learning_rate", "weight_sum")}
        # A copy of its own: params and state are donated together.
        return adam.init(params) | zeros | {"z": jax.tree.map(jnp.copy, params)}

    def update(gradients: Any, state: dict[str, Any], params: Any) -> tuple[Any, dict[str, Any]]:
        steps, moments = adam.update(gradients, state, gradient_at(params, state))
        z = optax.apply_updates(state["z"], steps)
        largest = jnp.maximum(state["max_learning_rate"], schedule(state["count"]))
        total = state["weight_sum"] + largest**2
        share = jnp.where(total > 0, largest**2 / total, 0.0)
        updates = jax.tree.map(lambda x, z: share * (z - x), params, z)
        return updates, moments | {"z": z, "max_learning_rate": largest, "weight_sum": total}

    return Optimizer(init, update, gradient_at)
