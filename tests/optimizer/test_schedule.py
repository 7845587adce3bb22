"""Schedules against the published check values and against the formulas in float64."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelm_jax.optimizer.schedule import (
    COOLDOWNS,
    constant,
    cosine,
    hybrid,
    inverse_sqrt,
    make_schedule,
    with_cooldown,
)

SIZE_1_6B = dict(peak=1e-3, minimum=1e-4, warmup_steps=9_720, total_steps=540_000)
SIZE_12B = dict(peak=3e-4, minimum=3e-5, warmup_steps=4_940, total_steps=760_000)
SIZE_3B = dict(peak=3.2e-4, minimum=1.28e-5, warmup_steps=4_775, total_steps=955_000)


def exact_hybrid(i, *, peak, minimum, warmup_steps, total_steps, shift_warmup=False):
    """The published form, alpha / sqrt(i + beta), in Python's float64."""
    if i < warmup_steps:
        return peak * i / warmup_steps
    if shift_warmup:
        i -= warmup_steps
    if i <= total_steps / 4:
        return minimum + (peak - minimum) / 2 * (math.cos(2 * math.pi * i / total_steps) + 1)
    q = total_steps * (peak + minimum) / (4 * math.pi * (peak - minimum))
    beta = q - total_steps / 4
    alpha = (peak + minimum) / 2 * math.sqrt(q)
    return alpha / math.sqrt(i + beta)


def exact_cosine(i, *, peak, minimum, warmup_steps, total_steps, shift_warmup=True):
    """What GPT-NeoX's AnnealingLR gives, in Python's float64."""
    if i < warmup_steps:
        return peak * i / warmup_steps
    shift = warmup_steps if shift_warmup else 0
    i = min(i, total_steps - shift) - shift
    return max(peak / 2 * (math.cos(math.pi * i / total_steps) + 1), minimum)


def steps_around(settings, count=4000, seed=0):
    """Random steps, and every step next to a place where a formula changes."""
    total, warmup = settings["total_steps"], settings["warmup_steps"]
    corners = np.array([0, warmup, total // 4, total // 4 + warmup, total - warmup, total])
    near = (corners[:, None] + np.arange(-3, 4)).ravel()
    anywhere = np.random.default_rng(seed).integers(0, 2 * total, count)
    return np.unique(np.concatenate([near[near >= 0], anywhere])).astype(np.int32)


def test_the_1_6b_has_its_check_values():
    values = {
        0: 0.0,
        4_860: 5e-4,
        9_720: 9.971253e-4,
        135_000: 5.5e-4,
        300_000: 2.7026e-4,
        420_000: 2.169598e-4,
        500_000: 1.950700e-4,
    }
    got = jax.jit(jax.vmap(hybrid(**SIZE_1_6B)))(np.array(list(values), np.int32))
    for step, learning_rate in zip(values, got, strict=True):
        digits = 2e-5 if step == 300_000 else 5e-7  # as many as the value is known to
        assert float(learning_rate) == pytest.approx(values[step], rel=digits), step


def test_counted_from_the_end_of_the_warmup_step_420000_is_2_2015e_4():
    shifted = hybrid(**SIZE_1_6B, shift_warmup=True)
    assert float(shifted(420_000)) == pytest.approx(2.2015e-4, rel=2e-5)


def test_alpha_and_beta_are_the_ones_of_the_closed_form():
    with jax.enable_x64(True):
        schedule = jax.jit(jax.vmap(hybrid(**SIZE_1_6B)))
        near, far = 1 / np.asarray(schedule(np.array([200_000, 500_000]))) ** 2
    alpha_squared = 300_000 / (far - near)  # 1 / eta^2 = (i + beta) / alpha^2
    assert math.sqrt(alpha_squared) == pytest.approx(0.12604619, rel=1e-7)
    assert near * alpha_squared - 200_000 == pytest.approx(-82_478.869, rel=1e-8)


@pytest.mark.parametrize("shift_warmup", [False, True])
@pytest.mark.parametrize("settings", [SIZE_1_6B, SIZE_12B])
def test_hybrid_in_float32_is_within_1e_6_of_float64_at_every_step(settings, shift_warmup):
    steps = steps_around(settings)
    got = jax.jit(jax.vmap(hybrid(**settings, shift_warmup=shift_warmup)))(steps)
    assert got.dtype == jnp.float32
    exact = [exact_hybrid(int(i), **settings, shift_warmup=shift_warmup) for i in steps]
    np.testing.assert_allclose(got, exact, rtol=1e-6)


@pytest.mark.parametrize("shift_warmup", [False, True])
@pytest.mark.parametrize("minimum", [1.28e-5, 0.0])
def test_cosine_in_float32_is_within_1e_6_of_gpt_neox(minimum, shift_warmup):
    settings = SIZE_3B | dict(minimum=minimum)
    steps = steps_around(settings)
    got = jax.jit(jax.vmap(cosine(**settings, shift_warmup=shift_warmup)))(steps)
    exact = [exact_cosine(int(i), **settings, shift_warmup=shift_warmup) for i in steps]
    # 1 + cos cancels near its end, in the oracle's float64 too: hence the absolute term
    np.testing.assert_allclose(got, exact, rtol=1e-6, atol=1e-18)


def test_the_inverse_square_root_in_float32_is_within_1e_6_of_float64_at_every_step():
    steps = steps_around(SIZE_1_6B)
    got = jax.jit(jax.vmap(inverse_sqrt(peak=1e-3, warmup_steps=9_720)))(steps)
    exact = [1e-3 * min(i / 9_720, math.sqrt(9_720 / max(i, 1))) for i in steps.tolist()]
    np.testing.assert_allclose(got, exact, rtol=1e-6)


@pytest.mark.parametrize("end", [0.0, 1e-5])
@pytest.mark.parametrize("kind", list(COOLDOWNS))
def test_wsd_in_float32_is_within_1e_6_of_float64_at_every_step(kind, end):
    def exact(i):
        done = min(max((i - 420_000) / 80_000, 0), 1)
        gone = {
            "linear": done,
            "sqrt": math.sqrt(done),
            "cosine": math.sin(math.pi * done / 2) ** 2,
        }
        return 1e-3 * i / 9_720 if i < 9_720 else 1e-3 + (end - 1e-3) * gone[kind]

    near = [c + d for c in (420_000, 460_000, 500_000) for d in range(-3, 4)]
    steps = np.union1d(steps_around(SIZE_1_6B), near)
    stable = constant(peak=1e-3, warmup_steps=9_720)
    schedule = with_cooldown(stable, start=420_000, steps=80_000, kind=kind, end_value=end)
    got = jax.jit(jax.vmap(schedule))(steps)
    assert got.dtype == jnp.float32
    # 1 - sqrt cancels near its end, in the oracle's float64 too: hence the absolute term
    np.testing.assert_allclose(got, [exact(i) for i in steps.tolist()], rtol=1e-6, atol=1e-17)


@pytest.mark.parametrize("transition", [0.1, 0.25, 0.4])
@pytest.mark.parametrize("shift_warmup", [False, True])
def test_value_and_slope_are_continuous_at_the_transition(transition, shift_warmup):
    settings = dict(peak=7e-4, minimum=3e-5, warmup_steps=900, total_steps=100_000)
    with jax.enable_x64(True):
        schedule = hybrid(**settings, transition=transition, shift_warmup=shift_warmup)
        t = settings["total_steps"] * transition + (900 if shift_warmup else 0)
        derivatives = (schedule, jax.grad(schedule), jax.grad(jax.grad(schedule)))
        around = np.array([t - 1e-6, t + 1e-6])
        taken = jax.jit(lambda x: [jax.vmap(f)(x) for f in derivatives])(around)
        value, slope, bend = (np.asarray(x) for x in taken)
    assert value[0] == pytest.approx(value[1], rel=1e-9)
    assert slope[0] == pytest.approx(slope[1], rel=1e-6)
    assert slope[0] < 0
    assert bend[0] != pytest.approx(bend[1], rel=1e-2)  # the two formulas do differ


@pytest.mark.parametrize("kind", [hybrid, cosine])
def test_the_warmup_is_linear_from_zero(kind):
    schedule = kind(peak=2e-3, minimum=1e-4, warmup_steps=10, total_steps=1000)
    got = jax.jit(jax.vmap(schedule))(np.arange(10))
    np.testing.assert_allclose(got, 2e-3 * np.arange(10) / 10, rtol=1e-6)


def test_without_a_warmup_the_first_step_is_at_the_peak():
    settings = dict(peak=2e-3, minimum=1e-4, warmup_steps=0, total_steps=1000)
    assert float(hybrid(**settings)(0)) == pytest.approx(2e-3, rel=1e-6)
    assert float(cosine(**settings)(0)) == pytest.approx(2e-3, rel=1e-6)


def test_a_cooldown_goes_on_from_where_the_schedule_is_and_ends_at_zero():
    base = hybrid(**SIZE_1_6B)
    cooled = with_cooldown(base, start=420_000, steps=80_000)
    for step in (0, 9_719, 135_000, 419_999):
        assert float(cooled(step)) == float(base(step))
    start = exact_hybrid(420_000, **SIZE_1_6B)
    steps = np.array([420_000, 420_001, 460_000, 499_999, 500_000])
    got = [float(cooled(int(step))) for step in steps]
    np.testing.assert_allclose(got, start * (500_000 - steps) / 80_000, rtol=1e-6)
    assert float(cooled(500_001)) == 0.0


def test_a_cooldown_may_start_and_end_elsewhere():
    cooled = with_cooldown(
        hybrid(**SIZE_1_6B), start=420_000, steps=80_000, start_value=2.529e-4, end_value=1e-5
    )
    assert float(cooled(420_000)) == pytest.approx(2.529e-4, rel=1e-6)
    assert float(cooled(440_000)) == pytest.approx(2.529e-4 * 0.75 + 1e-5 * 0.25, rel=1e-6)
    assert float(cooled(600_000)) == pytest.approx(1e-5, rel=1e-6)


def test_a_traced_step_gives_the_learning_rate_of_a_python_one():
    schedule = with_cooldown(hybrid(**SIZE_12B), start=600_000, steps=100_000)
    traced = jax.jit(schedule)
    for step in (0, 4_939, 4_940, 190_000, 190_001, 650_000, 759_999):
        assert float(traced(jnp.int32(step))) == pytest.approx(float(schedule(step)), rel=3e-7)


def test_no_step_makes_a_nan_on_the_way():
    schedule = with_cooldown(
        hybrid(peak=1e-3, minimum=1e-4, warmup_steps=0, total_steps=400), start=300, steps=1
    )
    with jax.debug_nans(True):
        for step in (0, 1, 100, 101, 300, 301, 10_000):
            assert math.isfinite(float(jax.jit(schedule)(step)))


def test_make_schedule_reads_every_field_of_the_config_group():
    group = SimpleNamespace(
        kind="hybrid",
        **SIZE_1_6B,
        transition=0.3,
        shift_warmup=True,
        cooldown_start=None,
        cooldown_steps=None,
        cooldown_kind="linear",
        cooldown_learning_rate=None,
        cooldown_end=0.0,
    )
    expected = hybrid(**SIZE_1_6B, transition=0.3, shift_warmup=True)
    assert float(make_schedule(group)(300_000)) == float(expected(300_000))
    group.kind, group.shift_warmup = "cosine", False
    expected = cosine(**SIZE_1_6B, shift_warmup=False)
    assert float(make_schedule(group)(300_000)) == float(expected(300_000))
    group.cooldown_start, group.cooldown_steps = 400_000, 100_000
    group.cooldown_learning_rate, group.cooldown_end = 5e-4, 1e-4
    assert float(make_schedule(group)(450_000)) == pytest.approx(3e-4, rel=1e-6)
    group.cooldown_kind = "sqrt"
    left = 1 - math.sqrt(0.5)
    assert float(make_schedule(group)(450_000)) == pytest.approx(1e-4 + 4e-4 * left, rel=1e-6)
    group.cooldown_start = None
    rates = {}
    for group.kind in ("constant", "wsd", "inverse_sqrt"):
        rates[group.kind] = float(make_schedule(group)(38_880))
    expected = {"constant": 1e-3, "wsd": 1e-3, "inverse_sqrt": 5e-4}
    assert rates == pytest.approx(expected, rel=1e-6)
