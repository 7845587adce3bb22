"""The kernels of `attention_tpu`: forward a block of queries of a head, backward a head's row.

A tile costs a TPU its matrix passes, half empty for heads of 64, as long as the vector unit does
less than that: so tiles that need no mask have none, and backward computes scores once for all
three gradients, five products in place of seven.

T queries and keys of a row, H head size, L = 128 lanes; of one tile, Q queries and S keys. A number
of each query stands in all lanes of its row, [Q, L], or along the lanes, [1, Q]. Refs, without a
suffix:
  bounds [4 * blocks of all rows]: borders of the blocks to visit (documents.py), in scalar memory.
  start: where the document of each query starts. logsumexp: that of its scaled scores.
  delta: the sum over H of o * do.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LANES = 128
_LOG2_E = math.log2(math.e)
# Below any score, and finite: the maximum of a row that has seen no key yet.
_LOWEST = -1e30


def forward(bounds, start, q, k, v, o, logsumexp, maximum, total, sums, *, tile):
    """One block of queries: start [1, Q]; q, o [Q, H]; k, v [T, H]; logsumexp [1, Q].

    Scratch, float32: maximum [Q, L] of the scores, total [Q, L] of their powers of two, a share in
    each lane; sums [Q, H].
    """
    block, num_blocks = pl.program_id(2), pl.num_programs(2)
    exponent = _LOG2_E / math.sqrt(q.shape[1])
    maximum[...] = jnp.full(maximum.shape, _LOWEST, jnp.float32)
    total[...] = jnp.zeros(total.shape, jnp.float32)
    sums[...] = jnp.zeros(sums.shape, jnp.float32)
    start_Q1 = _as_column(start[...])[:, :1]
    queries_Q1 = block * tile.queries + _iota((tile.queries, 1), 0)

    def step(masked, j, _):
        keys = _span(j, tile.keys)
        scores_QS = exponent * _dot(q[...], k[keys], 1, 1)
        if masked:
            keys_1S = j * tile.keys + _iota((1, tile.keys), 1)
            visible_QS = (start_Q1 <= keys_1S) & (keys_1S <= queries_Q1)
            scores_QS = jnp.where(visible_QS, scores_QS, -jnp.inf)
        before_QL = maximum[...]
        after_QL = jnp.maximum(before_QL, jnp.max(scores_QS, 1, keepdims=True))
        weights_QS = jnp.exp2(scores_QS - _across(after_QL, tile.keys))
        shrink_QL = jnp.exp2(before_QL - after_QL)
        maximum[...] = after_QL
        total[...] = total[...] * shrink_QL + _sums_of_lanes(weights_QS)
        added_QH = _dot(weights_QS.astype(v.dtype), v[keys], 1, 0)
        sums[...] = sums[...] * _across(shrink_QL, sums.shape[1]) + added_QH

    _visit(bounds, pl.program_id(0) * num_blocks + block, step)
    total_QL = jnp.broadcast_to(jnp.sum(total[...], 1, keepdims=True), total.shape)
    o[...] = (sums[...] / _across(total_QL, sums.shape[1])).astype(o.dtype)
    logsumexp[...] = _as_row(maximum[...] / _LOG2_E + jnp.log(total_QL))


def backward(
    bounds, start, q, k, v, do, logsumexp, delta, dq, dk, dv, dq_sum, dk_sum, dv_sum, *, tile
):
    """One query head's row, the heads of a key head in turn; scores stand as [S, Q].

    q, k, v, do, dq, dk, dv [T, H]; start, logsumexp, delta [T / Q, 1, Q]. Scratch, float32: the
    sums [T, H], those of keys over all heads that share them.
    """
    head, num_heads = pl.program_id(2), pl.num_programs(2)
    scale = 1 / math.sqrt(q.shape[1])
    num_blocks = k.shape[0] // tile.keys
    first_block = pl.program_id(0) * num_blocks
    dq_sum[...] = jnp.zeros(dq_sum.shape, jnp.float32)

    @pl.when(head == 0)
    def _():
        dk_sum[...] = jnp.zeros(dk_sum.shape, jnp.float32)
        dv_sum[...] = jnp.zeros(dv_sum.shape, jnp.float32)

    def of_keys(j, _):
        keys = _span(j, tile.keys)
        keys_S1 = j * tile.keys + _iota((tile.keys, 1), 0)

        def step(masked, i, _):
            queries = _span(i, tile.queries)
            q_QH, do_QH, k_SH = q[queries], do[queries], k[keys]
            scores_SQ = (scale * _LOG2_E) * _dot(k_SH, q_QH, 1, 1)
            weights_SQ = jnp.exp2(scores_SQ - _LOG2_E * logsumexp[i])
            if masked:
                queries_1Q = i * tile.queries + _iota((1, tile.queries), 1)
                visible_SQ = (start[i] <= keys_S1) & (keys_S1 <= queries_1Q)
                weights_SQ = jnp.where(visible_SQ, weights_SQ, 0.0)
            dv_sum[keys] += _dot(weights_SQ.astype(do_QH.dtype), do_QH, 1, 0)
            dweights_SQ = _dot(v[keys], do_QH, 1, 1)
            dscores_SQ = (weights_SQ * (dweights_SQ - delta[i])).astype(q_QH.dtype)
            dk_sum[keys] += _dot(dscores_SQ, q_QH, 1, 0)
            dq_sum[queries] += _dot(dscores_SQ, k_SH, 0, 0)

        _visit(bounds, first_block + j, step)

    jax.lax.fori_loop(0, num_blocks, of_keys, None)
    dq[...] = (scale * dq_sum[...]).astype(dq.dtype)

    @pl.when(head == num_heads - 1)
    def _():
        dk[...] = (scale * dk_sum[...]).astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)


def _visit(bounds, block, step):
    """step(masked, other block, None) for the blocks within this block's bounds, in order."""
    for border, masked in enumerate((True, False, True)):
        begin, end = bounds[4 * block + border], bounds[4 * block + border + 1]
        jax.lax.fori_loop(begin, end, partial(step, masked), None)


def _span(block, size):
    return pl.ds(pl.multiple_of(block * size, size), size)


def _iota(shape, axis):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _as_column(x_1Q):
    """[Q, L]: the values along the lanes, each in all lanes of its row."""
    return jnp.broadcast_to(x_1Q, (LANES, x_1Q.shape[1])).T


def _as_row(x_QL):
    """[1, Q]: the inverse of `_as_column`."""
    return x_QL.T[:1]


def _sums_of_lanes(x_QS):
    """[Q, L]: each lane's own sum; between lanes it is added once, after the last tile."""
    return sum(x_QS[:, i : i + LANES] for i in range(0, x_QS.shape[1], LANES))


def _across(x_QL, size):
    """[Q, size]: the values of rows in as many lanes."""
    if size <= LANES:
        return x_QL[:, :size]
    return jnp.broadcast_to(x_QL[:, :1], (x_QL.shape[0], size))


def _dot(a, b, of_a, of_b):
    dims = (((of_a,), (of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
