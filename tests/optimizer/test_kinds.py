"""Each optimizer against its formulas in numpy's float64, on random trees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablelm_jax import config as config_lib
from stablelm_jax.config.tree import OPTIMIZERS
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import ParameterSpec, flatten, nest, parameter_table
from stablelm_jax.optimizer.kinds import make_optimizer
from stablelm_jax.optimizer.parts import decay_mask

WIDE, LONG = "layers/a/kernel", "layers/out/kernel"
TABLE = (
    ParameterSpec("embed/embedding", (7, 2), 1.0, True, ("vocab", "width")),
    ParameterSpec(WIDE, (2, 3, 5), 1.0, True, ("layers", "width", "feed_forward"), 1),
    ParameterSpec("layers/a/bias", (2, 5), "zeros", False, ("layers", "feed_forward")),
    ParameterSpec(LONG, (2, 2, 3, 4), 1.0, True, ("layers", "heads", "head_size", "width"), 2),
    ParameterSpec("norm/scale", (4,), "ones", False, ("width",)),
    ParameterSpec("head/kernel", (2, 7), 1.0, True, ("width", "vocab"), 1),
)
DECAYED = {row.name: row.decay for row in TABLE}


def settings(kind, **values):
    found = config_lib.default_config().optimizer
    found.update({"kind": kind, "ademamix_warmup_steps": 30, **values})
    return found


def made(found, schedule, table=TABLE):
    return make_optimizer(found, schedule, table)


def schedule(count):
    return 1e-2 * count / (1 + count**2 / 9)  # 0 at first, the most at 3


def random_tree(rng, scale):
    drawn = {row.name: np.float32(rng.normal(size=row.shape) * scale) for row in TABLE}
    return nest(drawn)


class Oracle:
    """The published updates in float64, of {name: array}. One class for all: what differs between
    them is the direction, and for schedule-free AdamW what becomes of it."""

    def __init__(self, found, params):
        self.o, self.count, self.params = found, 0, {k: np.float64(p) for k, p in params.items()}
        self.state = {name: {} for name in ("m", "v", "m_slow")}
        self.z, self.total, self.largest = dict(self.params), 0.0, 0.0

    def average(self, of, name, value, beta):
        old = self.state[of].get(name, np.zeros_like(value))
        self.state[of][name] = beta * old + (1 - beta) * value
        return self.state[of][name]

    def adam(self, name, g, b1):
        m = self.average("m", name, g, b1) / (1 - b1**self.count)
        v = self.average("v", name, g**2, self.o.b2) / (1 - self.o.b2**self.count)
        return m, np.sqrt(v) + self.o.epsilon

    def direction(self, name, g):
        kind, o = self.o.kind, self.o
        if kind == "lion":
            old = self.state["m"].get(name, np.zeros_like(g))
            self.average("m", name, g, o.lion_b2)
            return np.sign(o.lion_b1 * old + (1 - o.lion_b1) * g)
        if kind == "muon" and name in (WIDE, LONG):
            self.state["m"][name] = o.muon_momentum * self.state["m"].get(name, 0.0) + g
            return self.orthogonal(name, g + o.muon_momentum * self.state["m"][name])
        if kind == "schedule_free_adamw":
            root = self.adam(name, g, 0.0)[1]
            del self.state["m"][name]
            return g / root
        m, root = self.adam(name, g, o.b1)
        if kind == "ademamix":
            share = min(self.count / max(o.ademamix_warmup_steps, 1), 1)
            half_life = (1 - share) / np.log(o.b1) + share / np.log(o.ademamix_b3)
            slow = self.average("m_slow", name, g, np.exp(1 / half_life))
            m = m + share * o.ademamix_alpha * slow
        return m / root

    def orthogonal(self, name, stack):
        """By singular values, which is all that the iteration changes."""
        inputs = 3 if name == WIDE else 6
        found = []
        for matrix in stack.reshape(2, inputs, -1):
            u, s, vt = np.linalg.svd(matrix, full_matrices=False)
            s = s / np.linalg.norm(s)
            for _ in range(self.o.muon_steps):
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            outputs = matrix.shape[1]
            factor = {
                "moonlight": 0.2 * np.sqrt(max(inputs, outputs)),
                "jordan": np.sqrt(max(1, outputs / inputs)),
            }[self.o.muon_scale]
            found.append(factor * (u * s) @ vt)
        return np.reshape(found, stack.shape)

    def step(self, gradients):
        o, rate = self.o, schedule(self.count)
        norm = np.sqrt(sum((np.float64(g) ** 2).sum() for g in gradients.values()))
        clipped = {k: np.float64(g) * min(1.0, o.clip_norm / norm) for k, g in gradients.items()}
        self.count += 1
        free = o.kind == "schedule_free_adamw"
        self.largest = max(self.largest, rate)
        self.total += self.largest**2
        for name, g in clipped.items():
            x, z = self.params[name], self.z[name]
            at = o.b1 * x + (1 - o.b1) * z if free else x
            moved = rate * (self.direction(name, g) + o.weight_decay * DECAYED[name] * at)
            if free:
                self.z[name] = z - moved
                share = self.largest**2 / self.total if self.total else 0.0
                self.params[name] = (1 - share) * x + share * self.z[name]
            else:
                self.params[name] = x - moved


CASES = [
    ("adamw", {}),
    ("adamw", dict(epsilon=1e-2, clip_norm=0.75, weight_decay=0.3)),
    ("adamw", dict(b1=0.5, b2=0.8, clip_norm=100.0)),
    ("muon", {}),
    ("muon", dict(muon_scale="jordan", muon_steps=3, muon_momentum=0.8, weight_decay=0.3)),
    ("lion", {}),
    ("lion", dict(lion_b1=0.8, lion_b2=0.9, clip_norm=100.0)),
    ("ademamix", {}),
    ("ademamix", dict(ademamix_warmup_steps=9, ademamix_b3=0.99, ademamix_alpha=2.0)),
    ("ademamix", dict(ademamix_warmup_steps=0, ademamix_b3=0.99)),
    ("schedule_free_adamw", {}),
    ("schedule_free_adamw", dict(b1=0.6, weight_decay=0.3, clip_norm=100.0)),
]


WAYS = [(number, False) for number in range(len(CASES))] + [(0, True), (1, True), (2, True)]


@pytest.mark.parametrize(
    ("number", "in_place"), WAYS, ids=[f"{CASES[n][0]}{n}{'_in_place' * way}" for n, way in WAYS]
)
def test_twenty_steps_follow_the_formulas(number, in_place):
    found, rng = settings(CASES[number][0], **CASES[number][1]), np.random.default_rng(number)
    optimizer, params = made(found, schedule), random_tree(rng, 1.0)
    oracle, state = Oracle(found, flatten(params)), optimizer.init(params)

    @jax.jit
    def step(gradients, state, params):
        norm = optax.tree.norm(gradients)
        if in_place:
            return *optimizer.in_place(gradients, norm, state, params, jnp.bool_(True)), norm
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, norm

    norms = []
    for _ in range(20):
        gradients = random_tree(rng, rng.choice([0.01, 1.0]))
        params, state, norm = step(gradients, state, params)
        norms.append(float(norm))
        oracle.step(flatten(gradients))
        for name, got in flatten(params).items():
            # five turns of the iteration multiply float32's error in a small singular value by 500
            near = 2e-5 if found.kind == "muon" and name in (WIDE, LONG) else 3e-7
            np.testing.assert_allclose(got, oracle.params[name], rtol=2e-6, atol=near)
    assert min(norms) < 0.5 < 5 < max(norms)  # clipped steps and others
    assert int(state["count"]) == 20
    expected = oracle.state | {"z": oracle.z if "z" in state else {}}
    for part, leaves in expected.items():
        assert flatten(state.get(part, {})).keys() == leaves.keys(), part
        for name, exact in leaves.items():
            got = flatten(state[part])[name]
            # 1 - b3 has five digits in float32
            near = dict(rtol=1e-5, atol=1e-7) if part != "m_slow" else dict(rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(got, exact, **near)


def test_in_place_no_array_is_copied_and_an_update_left_out_changes_nothing():
    row = ParameterSpec("head/kernel", (64, 64), 1.0, True, ("width", "vocab"), 1)
    optimizer, rng = made(settings("adamw"), schedule, (row,)), np.random.default_rng(0)
    gradients, params, m, v = (nest({row.name: rng.random(row.shape, "f4")}) for _ in range(4))
    state = {"m": m, "v": v, "count": np.int32(5)}

    def update(params, state, good):
        return optimizer.in_place(gradients, jnp.float32(1.0), state, params, good)

    arguments = params, state, jnp.bool_(False)
    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(*arguments).compile()
    after = compiled(*arguments)
    jax.tree.map(np.testing.assert_array_equal, after, (params, state))
    assert compiled.memory_analysis().temp_size_in_bytes < params["head"]["kernel"].nbytes


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_gradient_of_zero_only_decays_and_only_what_is_in_the_mask(kind):
    params = random_tree(np.random.default_rng(3), 1.0)
    optimizer = made(settings(kind, weight_decay=0.1), lambda count: 0.5)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    for name, update in flatten(updates).items():
        expected = -0.5 * 0.1 * flatten(params)[name] * DECAYED[name]
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_schedule_is_asked_for_the_number_of_updates_so_far(kind):
    params, asked = random_tree(np.random.default_rng(4), 1.0), []
    schedule = lambda count: asked.append(int(count)) or jnp.float32(0.1)  # noqa: E731
    optimizer = made(settings(kind), schedule)
    state = optimizer.init(params)
    for count in range(3):
        _, state = optimizer.update(params, state, params)
        assert set(asked) == {count} and int(state["count"]) == count + 1
        asked.clear()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_is_float32_under_the_parameters_names_and_other_weights_are_refused(kind):
    optimizer = made(settings(kind), schedule)
    params = random_tree(np.random.default_rng(5), 1.0)
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    _, state = jax.jit(optimizer.update)(low, optimizer.init(params), params)
    for name, leaf in flatten(state).items():
        assert leaf.dtype == (jnp.int32 if name == "count" else jnp.float32)
        if "/" in name:
            assert leaf.shape == flatten(params)[name.split("/", 1)[1]].shape
    with pytest.raises(ValueError, match=r"parameter .* is bfloat16.*float32 weights"):
        optimizer.init(low)


@pytest.mark.parametrize("parallel_residual", [False, True])
def test_everything_but_norms_and_biases_decays(parallel_residual):
    model = ModelConfig(
        vocab_size=16, num_layers=2, width=16, num_heads=2, num_kv_heads=1, feed_forward_width=8,
        rotary_fraction=0.5, block_norm_bias=True, qk_norm=True,
        parallel_residual=parallel_residual,
    )  # fmt: skip
    mask = flatten(decay_mask(parameter_table(model)))
    assert len(mask) == len(parameter_table(model))
    for name, decayed in mask.items():
        last = name.split("/")[-1]
        assert last in ("kernel", "embedding", "scale", "bias")
        assert decayed == (last in ("kernel", "embedding")), name


def test_muon_takes_the_matrices_of_the_layers_and_leaves_embedding_head_norms_biases_to_adam():
    model = ModelConfig(
        vocab_size=16, num_layers=2, width=16, num_heads=4, num_kv_heads=2, feed_forward_width=8,
        rotary_fraction=0.5, qkv_bias=True, qk_norm=True,
    )  # fmt: skip
    table = parameter_table(model)
    params = nest({row.name: np.ones(row.shape, np.float32) for row in table})
    optimizer = made(settings("muon"), lambda count: 1.0, table)
    by_adam = set(flatten(optimizer.init(params)["v"]))
    kernels = {f"attention/{name}" for name in ("query", "key", "value", "out")}
    kernels |= {f"mlp/{name}" for name in ("gate", "up", "down")}
    assert {row.name for row in table} - by_adam == {f"layers/{name}/kernel" for name in kernels}
    # heads together are one matrix, [16, 4 x 4]: all its singular values are near 1
    rng = np.random.default_rng(6)
    gradients = nest({row.name: np.float32(rng.normal(size=row.shape)) for row in table})
    found = settings("muon", weight_decay=0.0, muon_scale="jordan")
    optimizer = made(found, lambda count: 1.0, table)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    for part in ("query", "out"):
        for matrix in np.asarray(updates["layers"]["attention"][part]["kernel"]).reshape(2, 16, 16):
            values = np.linalg.svd(matrix, compute_uv=False)
            assert 0.6 < np.median(values) and values.max() < 1.3


def test_schedule_free_is_optax_with_x_in_the_place_of_y():
    """Both with a constant rate, where optax's counting one ahead makes no difference."""
    found = settings("schedule_free_adamw", clip_norm=1e9, weight_decay=0.0)
    ours, rng = made(found, lambda count: jnp.float32(0.01)), np.random.default_rng(7)
    theirs = optax.contrib.schedule_free_adamw(0.01, b1=found.b1, b2=found.b2, eps=found.epsilon)
    x = y = random_tree(rng, 1.0)
    state, their_state = ours.init(x), theirs.init(y)
    for _ in range(10):
        near = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6)  # noqa: E731
        jax.tree.map(near, ours.gradient_at(x, state), y)
        gradients = random_tree(rng, 1.0)
        updates, state = jax.jit(ours.update)(gradients, state, x)
        x = optax.apply_updates(x, updates)
        updates, their_state = jax.jit(theirs.update)(gradients, their_state, y)
        y = optax.apply_updates(y, updates)
        jax.tree.map(near, x, optax.contrib.schedule_free_eval_params(their_state, y))
