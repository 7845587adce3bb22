"""Attention in float64 and inputs that try it, for the tests of its kernels.

Order everywhere: q, k, v, the gradient of the output, segment ids; results: output, dq, dk, dv.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def in_float64(q, k, v, do, segments):
    """Output and gradients of q, k, v from the T x T weights."""
    scale, group = q.shape[3] ** -0.5, q.shape[2] // k.shape[2]
    # [B, N, T, H]: products of matrices, which take a fraction of einsum's time
    q, k, v, do = (np.swapaxes(np.asarray(x, np.float64), 1, 2) for x in (q, k, v, do))
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    transposed = lambda x: np.swapaxes(x, 2, 3)  # noqa: E731
    scores = np.where(allowed(segments)[:, None], scale * (q @ transposed(k)), -1e9)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    dweights = do @ transposed(v)
    dscores = scale * weights * (dweights - np.sum(weights * dweights, -1, keepdims=True))
    dk, dv = transposed(dscores) @ q, transposed(weights) @ do
    dk, dv = (x.reshape(len(x), -1, group, *x.shape[2:]).sum(2) for x in (dk, dv))
    return [np.swapaxes(x, 1, 2) for x in (weights @ v, dscores @ k, dk, dv)]


def allowed(segments):
    positions = np.arange(segments.shape[1])
    same = segments[:, :, None] == segments[:, None, :]
    return same & (positions[:, None] >= positions)


def rows_of_documents(length, block=16, seed=0):
    """One document; documents around a block's length; of one token; of any length."""
    around = np.repeat([1, 2, 3, 4, 5], [1, block - 1, block, block + 1, length])[:length]
    anywhere = np.sort(np.random.default_rng(seed).integers(-3, 4, length))
    return np.int32([np.full(length, 7), around, np.arange(length), anywhere])


def random_inputs(heads, kv_heads, size, length, dtype=jnp.float32, block=16):
    rng = np.random.default_rng([heads, kv_heads, size, length])
    segments = rows_of_documents(length, block)
    shapes = [(4, length, n, size) for n in (heads, kv_heads, kv_heads, heads)]
    return *(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes), segments


def with_gradients(implementation, q, k, v, do, segments):
    """Output and gradients of q, k, v."""

    @jax.jit
    def run(q, k, v, do):
        out, backward = jax.vjp(lambda *qkv: implementation(*qkv, segments), q, k, v)
        return out, *backward(do)

    return [np.asarray(x, np.float64) for x in run(q, k, v, do)]


def layers_of(attend, policy):
    """Three layers of attention, scanned and rematerialised, summed."""

    @partial(jax.checkpoint, policy=policy)
    def layer(x_BTNH, segments):
        x_BTNH = jnp.tanh(x_BTNH)  # keeps scores, and with them what rounding does, small
        return x_BTNH + attend(x_BTNH, 0.5 * x_BTNH, x_BTNH, segments)

    def total(x_BTNH, segments):
        out = jax.lax.scan(lambda x, _: (layer(x, segments), None), x_BTNH, length=3)[0]
        return jnp.sum(out**2)

    return total
