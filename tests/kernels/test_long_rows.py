"""Rows of 32,768 tokens in the kernels: some queries and keys, against float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from seeds import new_rng

from stablelm_jax.kernels.attention_gpu import Blocks, Tile, pallas_gpu
from stablelm_jax.kernels.attention_splash import splash
from stablelm_jax.kernels.attention_tpu import pallas_tpu
from stablelm_jax.kernels.documents import Tile as TpuTile

LENGTH, SIZE, FIRST = 32_768, 16, 1_500  # a short document, then one to the end of the row
LARGE = Blocks(*3 * [Tile(1024, 1024, 4, 2)])  # few of them: the interpreter is slow
KERNELS = {
    "gpu": partial(pallas_gpu, blocks=LARGE, interpret=True),
    "tpu": partial(pallas_tpu, tile=TpuTile(1024, 1024), interpret=True),
    "splash": partial(splash, interpret=True),
}


@pytest.mark.by_hand  # a minute each
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_last_queries_of_a_long_document_see_all_of_it(kernel):
    rng = new_rng()
    q, k, v = (rng.normal(size=(1, LENGTH, 1, SIZE)).astype(np.float32) for _ in range(3))
    ids = jnp.asarray((np.arange(LENGTH) >= FIRST).astype(np.int32))[None] + 1
    queries = np.array([FIRST, 4_096, 30_000, LENGTH - 1])
    weights = rng.normal(size=(len(queries), SIZE)).astype(np.float32)

    def loss(q, k, v):
        o = KERNELS[kernel](q, k, v, ids)[0, queries, 0]
        return jnp.sum(o * weights), o

    found, o = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    expected = _in_float64(*(x[0, :, 0].astype(np.float64) for x in (q, k, v)), queries, weights)
    o_expected, *gradients = expected
    # float32 sums of up to 31,268 terms, tile after tile
    np.testing.assert_allclose(o, o_expected, rtol=0, atol=1e-5 * np.abs(o_expected).max())
    for name, ours, theirs in zip("qkv", found, gradients):
        tolerance = 1e-5 * np.abs(theirs).max()
        np.testing.assert_allclose(ours[0, :, 0], theirs, rtol=0, atol=tolerance, err_msg=name)


def _in_float64(q, k, v, queries, do):
    """Results of these queries, and the gradients of sum(result * do) for q, k, v."""
    seen = (np.arange(LENGTH) >= FIRST) & (np.arange(LENGTH) <= queries[:, None])
    scores = np.where(seen, q[queries] @ k.T / np.sqrt(SIZE), -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    o = weights @ v
    dscores = weights * (do @ v.T - (do * o).sum(1, keepdims=True)) / np.sqrt(SIZE)
    dq = np.zeros_like(q)
    dq[queries] = dscores @ k
    return o, dq, dscores.T @ q[queries], weights.T @ do
