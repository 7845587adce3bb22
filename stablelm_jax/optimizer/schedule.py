"""Learning rates: a linear warmup, then one of `make_schedule`'s kinds, then if asked a cooldown.

Symbols as in the formulas: M peak, m minimum, N total_steps, W warmup_steps, i the step counted
from 0 (the first update of a run has i = 0 and so, with a warmup, learning rate 0).

Every schedule is an `optax.Schedule`: it takes a Python or traced integer and gives a float32
scalar within 1e-6 of the exact value, for any step a float32 counts exactly (below 2**24).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax


def make_schedule(settings: Any) -> optax.Schedule:
    """The schedule that a config's group `schedule` (any object with its fields) describes."""
    shared = dict(peak=settings.peak, warmup_steps=settings.warmup_steps)
    shaped = dict(
        minimum=settings.minimum,
        total_steps=settings.total_steps,
        shift_warmup=settings.shift_warmup,
    )
    if settings.kind == "hybrid":
        schedule = hybrid(**shared, **shaped, transition=settings.transition)
    elif settings.kind == "cosine":
        schedule = cosine(**shared, **shaped)
    elif settings.kind == "inverse_sqrt":
        schedule = inverse_sqrt(**shared)
    else:  # 'wsd' is 'constant' with a cooldown
        schedule = constant(**shared)
    if settings.cooldown_start is None:
        return schedule
    return with_cooldown(
        schedule,
        start=settings.cooldown_start,
        steps=settings.cooldown_steps,
        kind=settings.cooldown_kind,
        start_value=settings.cooldown_learning_rate,
        end_value=settings.cooldown_end,
    )


def hybrid(
    *,
    peak: float,
    minimum: float,
    warmup_steps: int,
    total_steps: int,
    transition: float = 0.25,
    shift_warmup: bool = False,
) -> optax.Schedule:
    """Stable LM 2's schedule: a cosine up to N/4, then an inverse square root that has no end.

        i <  W          M * i / W
        i <= N/4        m + (M - m)/2 * (cos(2 pi i / N) + 1)
        i >  N/4        alpha / sqrt(i + beta)

    alpha and beta are such that value and slope agree at N/4 (`transition` = 1/4; below 1/2). As
    published, i counts the warmup too, so the cosine is already 0.3 % below M when the 1.6B's
    warmup hands over. With `shift_warmup` the last two lines count from the end of the warmup, as
    stock GPT-NeoX does. N is a horizon, not an end: any step may be asked for.

    Source: Stable LM 2's published configs (`hybrid_cosine_inv_sqrt_2`) give the constants; the
    form is the technical report's as others retell it, its code is not public.
    """
    # With t = N * transition, v = eta(t) and q = -v / (2 eta'(t)), matching value and slope gives
    # beta = q - t and alpha = v sqrt(q), that is eta(i) = v / sqrt(1 + (i - t) / q): a form with
    # nothing large to subtract in float32.
    t = total_steps * transition
    v = minimum + (peak - minimum) * math.cos(math.pi * transition) ** 2
    slope = -(peak - minimum) * math.pi / total_steps * math.sin(2 * math.pi * transition)
    q = -v / (2 * slope)

    def after_warmup(i: jax.Array) -> jax.Array:
        # (1 + cos 2x) / 2 = cos(x)^2
        early = minimum + (peak - minimum) * jnp.cos(math.pi / total_steps * jnp.minimum(i, t)) ** 2
        late = v / jnp.sqrt(1 + jnp.maximum(i - t, 0) / q)
        return jnp.where(i <= t, early, late)

    return _after_warmup(after_warmup, peak, warmup_steps, shift_warmup)


def cosine(
    *,
    peak: float,
    minimum: float,
    warmup_steps: int,
    total_steps: int,
    shift_warmup: bool = True,
) -> optax.Schedule:
    """GPT-NeoX's cosine: a half period to 0 over N steps, cut off below at m.

        i <  W          M * i / W
        i >= W          max(m, M/2 * (cos(pi (i - W) / N) + 1))

    It reaches m before N and stays there. NeoX counts from the end of the warmup but keeps the
    period N, and holds the value of step N - W from then on. Without `shift_warmup`, i counts the
    warmup too and the last step that moves is N.

    Source: EleutherAI/gpt-neox, megatron/learning_rates.py.
    """
    last = total_steps - 2 * warmup_steps if shift_warmup else total_steps

    def after_warmup(i: jax.Array) -> jax.Array:
        # (1 + cos(pi s)) / 2 = sin(pi (1 - s) / 2)^2, exact near the end where 1 + cos cancels
        left = total_steps - jnp.clip(i, 0, last)
        return jnp.maximum(peak * jnp.sin(math.pi / 2 / total_steps * left) ** 2, minimum)

    return _after_warmup(after_warmup, peak, warmup_steps, shift_warmup)


def constant(*, peak: float, warmup_steps: int) -> optax.Schedule:
    """M from the end of the warmup on; with a cooldown it is WSD: warmup, stable, decay.

    Source: Hu et al. 2024, MiniCPM, arXiv 2404.06395, section 4.
    """
    return _after_warmup(lambda i: jnp.full_like(i, peak), peak, warmup_steps, shift=False)


def inverse_sqrt(*, peak: float, warmup_steps: int) -> optax.Schedule:
    """M * sqrt(W / i) from step W on, which has no end; W is 1 or more.

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 5.3.
    """

    def after_warmup(i: jax.Array) -> jax.Array:
        return peak * jnp.sqrt(warmup_steps / jnp.maximum(i, warmup_steps))

    return _after_warmup(after_warmup, peak, warmup_steps, shift=False)


# How much of the first learning rate is left, by the shares of the steps that are left and done.
COOLDOWNS = {
    "linear": lambda left, done: left,
    # 1 - sqrt(done), exact near the end where that cancels (Hägele et al. 2024, arXiv 2405.18392)
    "sqrt": lambda left, done: left / (1 + jnp.sqrt(done)),
    "cosine": lambda left, done: jnp.sin(math.pi / 2 * left) ** 2,  # (1 + cos(pi done)) / 2
}


def with_cooldown(
    schedule: optax.Schedule,
    *,
    start: int,
    steps: int,
    kind: str = "linear",
    start_value: float | None = None,
    end_value: float = 0.0,
) -> optax.Schedule:
    """`schedule` up to step `start`, from there to `end_value` over `steps` steps.

    `kind`: one of `COOLDOWNS`. `start_value` is the learning rate of step `start`; by default the
    schedule's own there. (The 1.6B's card for the branch at step 420,000 says 2.529e-4, its
    schedule gives 2.170e-4: hence the choice.)
    """

    def cooled(step: jax.Array | int) -> jax.Array:
        i = _float(step)
        first = schedule(start) if start_value is None else start_value
        left, done = (jnp.clip(n / steps, 0, 1) for n in (start + steps - i, i - start))
        share = COOLDOWNS[kind](left, done)
        return jnp.where(i < start, schedule(step), first * share + end_value * (1 - share))

    return cooled


def _after_warmup(
    after_warmup: optax.Schedule, peak: float, warmup_steps: int, shift: bool
) -> optax.Schedule:
    """The linear warmup from 0 for the first `warmup_steps`, then `after_warmup`."""

    def schedule(step: jax.Array | int) -> jax.Array:
        i = _float(step)
        later = after_warmup(i - warmup_steps if shift else i)
        return jnp.where(i < warmup_steps, peak * (i / max(warmup_steps, 1)), later)

    return schedule


def _float(step: jax.Array | int) -> jax.Array:
    return jnp.asarray(step, float)  # float32 (float64 where jax has it enabled)
