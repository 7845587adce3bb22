"""AdamW against its formulas in numpy's float64, on random trees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablelm_jax import config as config_lib
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import parameter_table
from stablelm_jax.optimizer.adamw import adamw, decay_mask

SETTINGS = dict(b1=0.9, b2=0.95, epsilon=1e-8, weight_decay=0.1, clip_norm=1.0)
MASK = {"a": {"kernel": True, "bias": False}, "norm": {"scale": False}, "embedding": True}
SHAPES = {"a": {"kernel": (5, 3), "bias": (3,)}, "norm": {"scale": (4,)}, "embedding": (7, 2)}


def random_tree(rng, scale):
    draw = lambda shape: rng.normal(size=shape) * scale  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


class NumpyAdamW:
    """The published update in float64, leaf by leaf."""

    def __init__(self, schedule, mask, *, b1, b2, epsilon, weight_decay, clip_norm):
        self.schedule, self.b1, self.b2, self.epsilon = schedule, b1, b2, epsilon
        self.decay = [weight_decay * decayed for decayed in jax.tree.leaves(mask)]
        self.clip_norm, self.count, self.m, self.v = clip_norm, 0, None, None

    def step(self, params, gradients):
        norm = np.sqrt(sum((g**2).sum() for g in gradients))
        gradients = [g * min(1.0, self.clip_norm / norm) for g in gradients]
        zeros = [np.zeros_like(g) for g in gradients]
        m_g = zip(self.m or zeros, gradients, strict=True)
        self.m = [self.b1 * m + (1 - self.b1) * g for m, g in m_g]
        v_g = zip(self.v or zeros, gradients, strict=True)
        self.v = [self.b2 * v + (1 - self.b2) * g**2 for v, g in v_g]
        learning_rate = self.schedule(self.count)
        self.count += 1
        m_hat = [m / (1 - self.b1**self.count) for m in self.m]
        v_hat = [v / (1 - self.b2**self.count) for v in self.v]
        return [
            p - learning_rate * (m / (np.sqrt(v) + self.epsilon) + decay * p)
            for p, m, v, decay in zip(params, m_hat, v_hat, self.decay, strict=True)
        ]


def float32(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        SETTINGS | dict(epsilon=1e-2, clip_norm=0.75, weight_decay=0.3),
        SETTINGS | dict(b1=0.5, b2=0.8, clip_norm=100.0),
    ],
)
def test_twenty_steps_follow_the_formulas(settings):
    rng = np.random.default_rng(int(settings["clip_norm"]))
    schedule = lambda count: 1e-2 / (1 + count)  # noqa: E731
    optimizer, oracle = adamw(schedule, MASK, **settings), NumpyAdamW(schedule, MASK, **settings)
    params = float32(random_tree(rng, 1.0))
    exact = [np.asarray(p, np.float64) for p in jax.tree.leaves(params)]
    state = optimizer.init(params)

    @jax.jit
    def step(gradients, state, params):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, optax.tree.norm(gradients)

    norms = []
    for _ in range(20):
        gradients = float32(random_tree(rng, rng.choice([0.01, 1.0])))
        params, state, norm = step(gradients, state, params)
        norms.append(float(norm))
        exact = oracle.step(exact, [np.asarray(g, np.float64) for g in jax.tree.leaves(gradients)])
        for got, expected in zip(jax.tree.leaves(params), exact, strict=True):
            np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-7)
    assert min(norms) < 0.5 < 5 < max(norms)  # clipped steps and others
    get = optax.tree_utils.tree_get
    for got, expected in zip(jax.tree.leaves(get(state, "mu")), oracle.m, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-8)
    for got, expected in zip(jax.tree.leaves(get(state, "nu")), oracle.v, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-10)


def test_a_gradient_of_zero_only_decays_and_only_what_is_in_the_mask():
    params = float32(random_tree(np.random.default_rng(3), 1.0))
    optimizer = adamw(lambda count: 0.5, MASK, **SETTINGS)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    expected = jax.tree.map(lambda p, decayed: -0.5 * 0.1 * p * decayed, params, MASK)
    jax.tree.map(lambda u, e: np.testing.assert_allclose(u, e, rtol=1e-6), updates, expected)


def test_the_schedule_is_asked_for_the_number_of_updates_so_far():
    params = {"w": jnp.zeros(3)}
    optimizer = adamw(lambda count: jnp.where(count == 0, 0.0, count), {"w": True}, **SETTINGS)
    state = optimizer.init(params)
    gradient = {"w": jnp.array([0.1, -0.1, 0.2])}
    for count in range(3):
        assert int(optax.tree_utils.tree_get(state, "count")) == count  # one count, not two
        updates, state = jax.jit(optimizer.update)(gradient, state, params)
        np.testing.assert_allclose(updates["w"], -count * np.sign(gradient["w"]), rtol=1e-5)


def test_moments_are_float32_and_lower_precision_weights_are_refused():
    optimizer = adamw(lambda count: 1.0, {"w": True}, **SETTINGS)
    params = {"w": jnp.ones(3)}
    gradient = {"w": jnp.full(3, 0.1, jnp.bfloat16)}
    _, state = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    for moment in ("mu", "nu"):
        assert optax.tree_utils.tree_get(state, moment)["w"].dtype == jnp.float32
    with pytest.raises(ValueError, match=r"parameter w is bfloat16.*float32 weights"):
        optimizer.init({"w": jnp.ones(3, jnp.bfloat16)})


@pytest.mark.parametrize("parallel_residual", [False, True])
def test_everything_but_norms_and_biases_decays(parallel_residual):
    model = ModelConfig(
        vocab_size=16, num_layers=2, width=16, num_heads=2, num_kv_heads=1, feed_forward_width=8,
        rotary_fraction=0.5, block_norm_bias=True, qk_norm=True,
        parallel_residual=parallel_residual,
    )  # fmt: skip
    mask = decay_mask(parameter_table(model))
    leaves = jax.tree_util.tree_leaves_with_path(mask)
    assert len(leaves) == len(parameter_table(model))
    for path, decayed in leaves:
        last = path[-1].key
        assert last in ("kernel", "embedding", "scale", "bias")
        assert decayed == (last in ("kernel", "embedding")), path


def test_it_takes_the_config_group_and_the_parameters_of_the_model():
    model = ModelConfig(
        vocab_size=16, num_layers=1, width=16, num_heads=2, num_kv_heads=2, feed_forward_width=8,
        rotary_fraction=0.5,
    )  # fmt: skip
    settings = config_lib.default_config().optimizer
    settings.weight_decay = 0.25
    mask = decay_mask(parameter_table(model))
    optimizer = adamw(lambda count: 1.0, mask, **settings)
    params = jax.tree.map(lambda _: np.ones(2, np.float32), mask)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, state = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    jax.tree.map(
        lambda u, decayed: np.testing.assert_allclose(u, -0.25 if decayed else 0.0), updates, mask
    )
    # what places the optimizer's state on the mesh finds its moments
    places = optax.tree_map_params(optimizer, lambda _: 1, state, transform_non_params=lambda _: 0)
    assert sum(jax.tree.leaves(places)) == 2 * len(jax.tree.leaves(params))
