"""Are the kernels right on this device? One that is wrong on one chip ruins a run silently.

B batch, T queries or keys, N query heads, K key/value heads, H head size.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from stablelm_jax.kernels import attention, norms

# Tokens of the two rows: several tiles of every kernel, with documents that end inside of them.
LENGTH = 2048
# Tokens of a head that are judged together.
BLOCK = 64
# How much more than the plain form in the same dtype a kernel may err in any block. Correct kernels
# stay below 3 (tests/kernels/test_check.py has some that are wrong).
LIMIT = 5.0
# The squared relative error of float32 sums in another order, for where the plain form is exact.
_ROUNDING = 1e-11
_NAMES = ("the output", "the gradient of queries", "the gradient of keys", "the gradient of values")
_OF_A_NORM = ("the output", "the gradient of the input", "that of the scale", "that of the bias")


class WrongKernel(ValueError):
    """A kernel's results differ from the plain form's; the message says by how much."""


def check_attention(name: str, num_heads: int, num_kv_heads: int, head_size: int, dtype) -> float:
    """Runs one implementation, forward and backward, on two rows of random documents here.

    Returns:
      Its error divided by that of the plain form in `dtype`, both against the plain form in
      float32: the largest ratio over all blocks of the output and the three gradients.

    Raises:
      WrongKernel: it is above LIMIT, or not a number.
    """
    group = num_heads // num_kv_heads
    heads = [min(num_kv_heads, 2) * n for n in (group, 1, 1, group)]
    rng = np.random.default_rng(0)
    shapes = [(2, LENGTH, n, head_size) for n in heads]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    begins = rng.random((2, LENGTH)) < [[0.0], [6 / LENGTH]]
    segments_BT = np.cumsum(begins, 1, dtype=np.int32)

    @partial(jax.jit, static_argnums=0)
    def run(implementation, q, k, v, do):
        out, backward = jax.vjp(
            lambda *x: attention.attention(*x, segments_BT, implementation=implementation), q, k, v
        )
        return out, *backward(do)

    with jax.default_matmul_precision("highest"):
        expected = run("reference", *(x.astype(jnp.float32) for x in arrays))
    plain, found = run("reference", *arrays), run(name, *arrays)
    kernel = f"attention {name!r} for heads of {head_size} in {jnp.dtype(dtype).name}"
    remedy = "config.training.attention='chunked', which is slower"
    return _worst(kernel, remedy, _NAMES, expected, plain, found)


def check_norms(name: str, width: int, bias: bool, kind: norms.Kind, dtype) -> float:
    """As `check_attention`, of a layer's norm, on random rows, which are judged one by one."""
    rng = np.random.default_rng(0)
    shapes = [(LENGTH, width)] * 4 + [(width,)] * (1 + bias)
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]

    @partial(jax.jit, static_argnums=0)
    def run(implementation, dx, dy, dz, x, scale, bias=None):
        norm = lambda *x: norms.IMPLEMENTATIONS[implementation](*x, kind, 2)  # noqa: E731
        (_, (out, _)), backward = jax.vjp(norm, x, scale, bias)
        return out, *backward((dx, (dy, dz)))[: 2 + (bias is not None)]

    expected = run("xla", *(x.astype(jnp.float32) for x in arrays))
    kernel = f"norms {name!r} for a width of {width} in {jnp.dtype(dtype).name}"
    plain, found = run("xla", *arrays), run(name, *arrays)
    return _worst(kernel, "config.training.norms='xla'", _OF_A_NORM, expected, plain, found)


def _worst(kernel: str, remedy: str, names, expected, plain, found) -> float:
    worst = 0.0
    for what, exact, usual, ours in zip(names, expected, plain, found):
        error, usual_error = _by_block(ours, exact), _by_block(usual, exact)
        # In a single block, a document's first tokens for one, the plain form may be exact.
        exact_square = np.mean(np.asarray(exact, np.float64) ** 2)
        floor = max(_ROUNDING * exact_square, np.mean(usual_error**2)) ** 0.5 / 2
        ratio = float(np.max(error / np.maximum(usual_error, floor)))
        if not ratio <= LIMIT:  # also where it is not a number
            raise WrongKernel(
                f"{kernel} is wrong on {jax.devices()[0].device_kind}: in one block {what} errs "
                f"{ratio:.3g} times as much as the plain form; train with {remedy}, and report this"
            )
        worst = max(worst, ratio)
    return worst


def _by_block(found, exact) -> np.ndarray:
    """Root of the mean squared difference of every BLOCK tokens of a head, [B, T / BLOCK, N], or of
    every row."""
    difference = np.asarray(found, np.float64) - np.asarray(exact, np.float64)
    if difference.ndim < 4:
        return np.sqrt(np.mean(difference**2, -1))
    blocks = difference.reshape(len(difference), -1, BLOCK, *difference.shape[2:])
    return np.sqrt(np.mean(blocks**2, axis=(2, 4)))
