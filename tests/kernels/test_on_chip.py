"""The kernels on the chip itself; skipped where there is none.

With JAX_PLATFORMS=cuda and JAX_DISABLE_MOST_OPTIMIZATIONS=0:

    python -m pytest -s -m by_hand tests/kernels/test_on_chip.py
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import in_float64, random_inputs, with_gradients

from stablelm_jax.kernels import attention
from stablelm_jax.kernels.attention import reference
from stablelm_jax.kernels.check import WrongKernel, check_attention

KERNELS = {
    "gpu": ("pallas_gpu",),
    "tpu": ("pallas_tpu", "splash"),
    "cpu": (),
}[jax.default_backend()]

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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_in_bfloat16_it_errs_little_more_than_the_plain_form(name, shape):
    inputs = random_inputs(*shape, jnp.bfloat16, block=128)
    try:
        found = with_gradients(implementation(name), *inputs)
    except (NotImplementedError, ValueError) as error:  # it says that it cannot
        pytest.skip(str(error).splitlines()[0])
    plain, expected = with_gradients(reference, *inputs), in_float64(*inputs)
    for (what, limit), array, other, right in zip(LIMITS.items(), found, plain, expected):
        assert np.isfinite(array).all(), what
        ratio = np.linalg.norm(array - right) / np.linalg.norm(other - right)
        print(f"{name} {shape} {what}: {ratio:.2f} times the error of the plain form")
        assert ratio < limit, what


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="float32 is our GPU kernel's")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_is_tf32_at_most(shape):
    inputs = random_inputs(*shape, jnp.float32, block=128)
    found = with_gradients(implementation("pallas_gpu"), *inputs)
    for what, array, right in zip(("o", "dq", "dk", "dv"), found, in_float64(*inputs)):
        error = np.linalg.norm(array - right) / np.linalg.norm(right)
        print(f"{shape} {what}: {error:.1e}")
        assert error < 2**-10, what


@pytest.mark.parametrize("name", KERNELS[:1])  # ours: the others promise no such thing
def test_fifty_runs_give_the_same_bits_and_leave_nothing_unwritten(name):
    """Between runs the memory that results come from is filled with NaN."""
    *arrays, segments = random_inputs(32, 32, 64, 4096, jnp.bfloat16, block=128)

    @jax.jit
    def run(q, k, v, do):
        out, backward = jax.vjp(lambda *x: implementation(name)(*x, segments), q, k, v)
        return out, *backward(do)

    first = [np.asarray(x) for x in run(*arrays)]
    assert all(np.isfinite(np.float32(x)).all() for x in first)
    for _ in range(49):
        poison = [jnp.full_like(x, jnp.nan) for x in 3 * arrays]
        jax.block_until_ready(poison)
        del poison
        for before, now in zip(first, run(*arrays)):
            np.testing.assert_array_equal(before.view(np.uint16), np.asarray(now).view(np.uint16))


@pytest.mark.parametrize("size", [64, 160])
@pytest.mark.parametrize("name", KERNELS)
def test_what_is_tried_out_before_a_run_passes(name, size):
    implementation(name)
    try:
        error = check_attention(name, 8, 4, size, jnp.bfloat16)
    except WrongKernel:
        raise
    except (NotImplementedError, ValueError) as refused:
        pytest.skip(str(refused).splitlines()[0])
    print(f"{name} {size}: {error:.2f} times the error of the plain form")
