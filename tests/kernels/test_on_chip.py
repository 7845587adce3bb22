"""The kernels on the chip itself, most important first; skipped where there is none.

With JAX_PLATFORMS=cuda and JAX_DISABLE_MOST_OPTIMIZATIONS=0:

    python -m pytest -s -m by_hand tests/kernels/test_on_chip.py
"""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import in_float64, layers_of, random_inputs, with_gradients
from jax.sharding import PartitionSpec as P
from seeds import new_rng

from stablelm_jax.kernels import attention, norms
from stablelm_jax.kernels.attention import chunked, reference
from stablelm_jax.kernels.check import WrongKernel, check_attention, check_norms
from stablelm_jax.kernels.cross_entropy import cross_entropy
from stablelm_jax.kernels.residuals import SAVED_NAMES

KERNELS = {
    "gpu": ("pallas_gpu", "pallas_mosaic"),
    "tpu": ("pallas_tpu", "splash"),
    "cpu": (),
}[jax.default_backend()]
OURS = [name for name in KERNELS if name.startswith("pallas")]  # the others promise no bits

pytestmark = [
    pytest.mark.by_hand,
    pytest.mark.skipif(not KERNELS, reason="no accelerator here"),
]


def implementation(name):
    return partial(attention.attention, implementation=name)


# (query heads, key heads, head size, tokens); documents of one token, of a block and one beside it
SHAPES = (
    (4, 4, 64, 1024),
    (4, 1, 64, 1000),
    (4, 2, 80, 1024),
    (4, 4, 128, 1024),
    (8, 2, 160, 1024),
    (2, 2, 64, 5),
)


# Times the error of the plain form. Its dq and dk come of float32 products, those of every flash
# kernel of scores' gradients in bfloat16 and of delta from a rounded output: 1.40 and 1.53 times
# as much on one row of 512 tokens, in float64 with just these roundings.
LIMITS = {"o": 1.5, "dq": 1.7, "dk": 1.7, "dv": 1.5}


@contextlib.contextmanager
def skipped_where_refused():
    """Skips where our own check says that the kernel cannot, not where compiling it fails."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, WrongKernel) or not str(error).startswith("attention "):
            raise
        pytest.skip(str(error).splitlines()[0])


def run_or_skip(name, *inputs):
    """Output and gradients."""
    with skipped_where_refused():
        return with_gradients(implementation(name), *inputs)


def hold_to_float64(what, found, inputs, plain=reference, limits=LIMITS):
    plain_name, expected = plain.__name__, in_float64(*inputs)
    plain = with_gradients(plain, *inputs)
    for (array_name, limit), array, other, right in zip(limits.items(), found, plain, expected):
        assert np.isfinite(array).all(), array_name
        ratio = np.linalg.norm(array - right) / np.linalg.norm(other - right)
        print(f"{what} {array_name}: {ratio:.2f} times the error of {plain_name}")
        assert ratio < limit, array_name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_in_bfloat16_it_errs_little_more_than_the_plain_form(name, shape):
    inputs = random_inputs(*shape, jnp.bfloat16, block=128)
    hold_to_float64(f"{name} {shape}", run_or_skip(name, *inputs), inputs)


@pytest.mark.parametrize("shape", [(32, 32, 64), (32, 8, 160)], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_at_the_models_own_size_too(name, shape):
    """Of the heads of the 1.6B and the 12B, those of one key head are compared."""
    *arrays, segments = random_inputs(*shape, 4096, jnp.bfloat16, block=128)
    found = run_or_skip(name, *arrays, segments)
    heads, kv_heads, _ = shape
    key, rows = int(new_rng().integers(kv_heads)), np.array([0, 3])
    of_queries = slice(key * heads // kv_heads, (key + 1) * heads // kv_heads)
    of_keys = slice(key, key + 1)
    q, k, v, do = (
        x[rows][:, :, heads] for x, heads in zip(arrays, (of_queries, of_keys, of_keys, of_queries))
    )
    part = [
        x[rows][:, :, heads] for x, heads in zip(found, (of_queries, of_queries, of_keys, of_keys))
    ]
    hold_to_float64(f"{name} {shape}, key head {key}", part, (q, k, v, do, segments[rows]))


@pytest.mark.parametrize("shape", [(4, 4, 64, 1024), (8, 2, 160, 1024)], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_scores_of_100_and_gradients_of_a_millionth_lose_nothing_more(name, shape):
    q, k, v, do, segments = random_inputs(*shape, jnp.bfloat16, block=128)
    inputs = (30 * q, k, v, 1e-6 * do, segments)  # a score's standard deviation is 30
    found = run_or_skip(name, *inputs)
    # Where one weight is nearly all, delta cancels: its rounding is most of the error, in `chunked`
    # as in the kernels, and four times the plain form's.
    limits = dict.fromkeys(LIMITS, 1.2)
    hold_to_float64(f"{name} {shape}, large scores", found, inputs, chunked, limits)


@pytest.mark.parametrize("shape", [(2, 2, 64), (4, 2, 128), (8, 2, 160)], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_a_document_is_the_same_bits_whatever_its_neighbours_hold(name, shape):
    q, k, v, do, _ = random_inputs(*shape, 1024, jnp.bfloat16)
    segments = np.int32(np.repeat([[1, 2, 3]], [300, 411, 313], axis=1).repeat(4, 0))
    others = jnp.asarray(segments != 2)[:, :, None, None]
    disturbed = [jnp.where(others, 3 * x[::-1] + 1, x) for x in (q, k, v, do)]
    ours = run_or_skip(name, q, k, v, do, segments)
    theirs = run_or_skip(name, *disturbed, segments)
    for a, b in zip(ours, theirs):
        np.testing.assert_array_equal(a[:, 300:711], b[:, 300:711])
        assert (a[:, :300] != b[:, :300]).any() and (a[:, 711:] != b[:, 711:]).any()


@pytest.mark.parametrize("name", KERNELS)
def test_it_works_in_shard_map_scan_and_checkpoint(name):
    x, *_, segments = random_inputs(4, 4, 64, 1024, jnp.bfloat16, block=128)
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
    mesh = jax.sharding.Mesh(jax.devices()[:1], "data")

    def gradient(attend, x):
        split = partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
        inner = split(jax.grad(layers_of(attend, policy)), check_vma=False)
        return np.asarray(jax.jit(inner)(x, segments), np.float64)

    with jax.default_matmul_precision("highest"):
        exact = gradient(reference, x.astype(jnp.float32))
    plain, found = gradient(reference, x), gradient(implementation(name), x)
    ratio = np.linalg.norm(found - exact) / np.linalg.norm(plain - exact)
    print(f"{name}, three layers: {ratio:.2f} times the error of the plain form")
    assert ratio < 1.7


@pytest.mark.parametrize("num_valid", [None, 9_000])
@pytest.mark.parametrize("name", ["saved", "tiled"])
def test_cross_entropy_errs_little_more_than_the_plain_form(name, num_valid):
    """Two chunks of rows, the second not full."""
    rng = new_rng()
    x_BTD = jnp.asarray(rng.normal(size=(2, 2500, 256)), jnp.bfloat16)
    kernel_DV = jnp.asarray(rng.normal(size=(256, 10_000)) / 16, jnp.bfloat16)
    targets_BT = rng.integers(0, num_valid or 10_000, (2, 2500))
    weights_BT = jnp.asarray(rng.random((2, 2500)) / 5000, jnp.float32)

    def run(name, *arrays):
        loss = lambda x, w: cross_entropy(  # noqa: E731
            x, w, targets_BT, weights_BT, implementation=name, num_valid=num_valid
        )
        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*arrays)

    with jax.default_matmul_precision("highest"):
        exact = run("reference", x_BTD.astype(jnp.float32), kernel_DV.astype(jnp.float32))
    plain, found = run("reference", x_BTD, kernel_DV), run(name, x_BTD, kernel_DV)
    names = ("loss", "nll", "dx", "dkernel")
    for what, array, other, right in zip(names, *map(jax.tree.leaves, (found, plain, exact))):
        array, other, right = (np.asarray(x, np.float64) for x in (array, other, right))
        error, usual = (np.linalg.norm(x - right) for x in (array, other))
        print(f"{name} {what}: error {error:.1e}, of the plain form {usual:.1e}")
        # The gradient of the logits is rounded once more than in the plain form: 1.41 times. Where
        # that happens to be exact, sums of float32 in another order show.
        assert error < 1.6 * usual + 1e-6 * np.linalg.norm(right), what


@pytest.mark.parametrize("size", [64, 160])
@pytest.mark.parametrize("name", KERNELS)
def test_what_is_tried_out_before_a_run_passes(name, size):
    with skipped_where_refused():
        error = check_attention(name, 8, 4, size, jnp.bfloat16)
    print(f"{name} {size}: {error:.2f} times the error of the plain form")


@pytest.mark.parametrize("shape", [(32, 32, 64), (32, 8, 160)], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_fifty_runs_give_the_same_bits_and_leave_nothing_unwritten(name, shape):
    """Between runs the memory that results come from is filled with NaN."""
    *arrays, segments = random_inputs(*shape, 4096, jnp.bfloat16, block=128)

    @jax.jit
    def run(q, k, v, do):
        out, backward = jax.vjp(lambda *x: implementation(name)(*x, segments), q, k, v)
        return out, *backward(do)

    with skipped_where_refused():
        first = [np.asarray(x) for x in run(*arrays)]
    assert all(np.isfinite(np.float32(x)).all() for x in first)
    for _ in range(49):
        poison = [jnp.full_like(x, jnp.nan) for x in 3 * arrays]
        jax.block_until_ready(poison)
        del poison
        for before, now in zip(first, run(*arrays)):
            np.testing.assert_array_equal(before.view(np.uint16), np.asarray(now).view(np.uint16))


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="float32 is our GPU kernel's")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_is_tf32_at_most(shape):
    inputs = random_inputs(*shape, jnp.float32, block=128)
    found = with_gradients(implementation("pallas_gpu"), *inputs)
    for what, array, right in zip(("o", "dq", "dk", "dv"), found, in_float64(*inputs)):
        error = np.linalg.norm(array - right) / np.linalg.norm(right)
        print(f"{shape} {what}: {error:.1e}")
        assert error < 2**-10, what


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="the norms are for GPUs")
@pytest.mark.parametrize(
    "width, bias, kind",
    [(2048, False, "layer"), (2560, True, "layer"), (5120, False, "layer"), (100, True, "rms")],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_norms_are_right_and_the_same_bits_in_every_run(dtype, width, bias, kind):
    kind = norms.Kind(kind, 1e-5)
    error = check_norms("pallas_gpu", width, bias, kind, dtype)
    print(f"norms of {width} {jnp.dtype(dtype).name}: {error:.2f} times the plain form's error")
    keys = jax.random.split(jax.random.key(0), 5)
    x, dx, *dys = (jax.random.normal(key, (8192, width), dtype) for key in keys)
    scale = jnp.ones(width, dtype)

    @jax.jit
    def run(x, dx, *dys):
        norm = lambda *vectors: norms.pallas_gpu(*vectors, kind, len(dys))  # noqa: E731
        (_, normed), backward = jax.vjp(norm, x, scale, scale if bias else None)
        return normed[0], backward((dx, dys))

    first = jax.tree.leaves(run(x, dx, *dys))
    assert all(np.isfinite(np.float32(a)).all() for a in first)
    for _ in range(49):
        for before, now in zip(first, jax.tree.leaves(run(x, dx, *dys)), strict=True):
            np.testing.assert_array_equal(np.float32(before), np.float32(now))
