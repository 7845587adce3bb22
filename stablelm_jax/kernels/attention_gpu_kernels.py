"""The kernels of `attention_gpu`: a program makes a block of one output; no other writes there.

Sizes of Triton's arrays are powers of two. A head of 80 or 160 is handled as parts of 64 + 16 or
128 + 32, each with a product of its own: padded to 128 or 256 it would cost 1.6 times the matrix
work, registers and shared memory.

T queries or keys of a row, G query heads of one key head, H head size; of one tile, Q queries and
S keys. Lists under a name in H hold the parts of a head. Refs, without a suffix:
  bounds [4]: borders of the blocks to visit (documents.query_block_bounds).
  start: where the document of each query starts.
  logsumexp: that of a query's scaled scores. delta: the sum over H of o * do.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from stablelm_jax.kernels import documents

_LOG2_E = math.log2(math.e)
# Below any score, and finite: the maximum of a row that has seen no key yet.
_LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class Tile(documents.Tile):
    """Size of one kernel's tiles and how its programs run.

    Attributes:
      queries, keys: powers of two, at least the matrix instructions' 16.
      warps: how many a program has. stages: one more than the tiles that its loops load ahead.
    """

    warps: int
    stages: int


def forward(bounds, start, q, k, v, o, logsumexp, *, tile):
    parts, scale = _parts(q.shape[1]), 1 / math.sqrt(q.shape[1])
    # exp(scale * x) is exp2(exponent * x): the chip has an instruction for powers of two.
    exponent = scale * _LOG2_E
    q_QH, visible = _load(q, slice(None), parts), _visible_keys(start, tile)

    def step(masked, j, carry):
        maximum_Q, total_Q, o_QH = carry
        keys = _span(j, tile.keys)
        scores_QS = _dot_transposed(q_QH, _load(k, keys, parts))
        if masked:
            scores_QS = jnp.where(visible(j), scores_QS, -jnp.inf)
        new_maximum_Q = jnp.maximum(maximum_Q, jnp.max(scores_QS, 1))
        weights_QS = jnp.exp2(exponent * scores_QS - (exponent * new_maximum_Q)[:, None])
        shrink_Q = jnp.exp2(exponent * (maximum_Q - new_maximum_Q))
        total_Q = total_Q * shrink_Q + jnp.sum(weights_QS, 1)
        o_QH = [x * shrink_Q[:, None] for x in o_QH]
        o_QH = _add_products(o_QH, weights_QS, _load(v, keys, parts))
        return new_maximum_Q, total_Q, o_QH

    zeros_Q = jnp.zeros(tile.queries, jnp.float32)
    carry = (zeros_Q + _LOWEST, zeros_Q, _zeros(tile.queries, parts))
    maximum_Q, total_Q, o_QH = _visit(bounds, step, carry)
    _store(o, [x / total_Q[:, None] for x in o_QH], parts)
    logsumexp[...] = scale * maximum_Q + jnp.log(total_Q)


def query_gradient(bounds, start, q, k, v, do, logsumexp, delta, dq, *, tile):
    parts, scale = _parts(q.shape[1]), 1 / math.sqrt(q.shape[1])
    q_QH, do_QH = _load(q, slice(None), parts), _load(do, slice(None), parts)
    logsumexp_Q1, delta_Q1 = _LOG2_E * logsumexp[...][:, None], delta[...][:, None]
    visible = _visible_keys(start, tile)

    def step(masked, j, dq_QH):
        keys = _span(j, tile.keys)
        k_SH = _load(k, keys, parts)
        weights_QS = jnp.exp2(scale * _LOG2_E * _dot_transposed(q_QH, k_SH) - logsumexp_Q1)
        if masked:
            weights_QS = jnp.where(visible(j), weights_QS, 0.0)
        dweights_QS = _dot_transposed(do_QH, _load(v, keys, parts))
        return _add_products(dq_QH, weights_QS * (dweights_QS - delta_Q1), k_SH)

    dq_QH = _visit(bounds, step, _zeros(tile.queries, parts))
    _store(dq, [scale * x for x in dq_QH], parts)


def key_gradients(bounds, start, q, k, v, do, logsumexp, delta, dk, dv, *, tile):
    """Scores stand as [S, Q] here: as they come out they go into the next product."""
    parts, scale = _parts(k.shape[1]), 1 / math.sqrt(k.shape[1])
    k_SH, v_SH = _load(k, slice(None), parts), _load(v, slice(None), parts)
    keys_S1 = _indices(pl.program_id(0), tile.keys)[:, None]

    def step(masked, i, carry, head):
        dk_SH, dv_SH = carry
        queries = _span(i, tile.queries)
        q_QH, do_QH = _load(q, (queries, head), parts), _load(do, (queries, head), parts)
        logsumexp_Q = _LOG2_E * logsumexp[head, queries]
        scores_SQ = _dot_transposed(k_SH, q_QH)
        weights_SQ = jnp.exp2(scale * _LOG2_E * scores_SQ - logsumexp_Q[None, :])
        if masked:
            queries_1Q = _indices(i, tile.queries)[None, :]
            visible_SQ = (start[queries][None, :] <= keys_S1) & (keys_S1 <= queries_1Q)
            weights_SQ = jnp.where(visible_SQ, weights_SQ, 0.0)
        dv_SH = _add_products(dv_SH, weights_SQ, do_QH)
        dweights_SQ = _dot_transposed(v_SH, do_QH)
        dscores_SQ = weights_SQ * (dweights_SQ - delta[head, queries][None, :])
        return _add_products(dk_SH, dscores_SQ, q_QH), dv_SH

    def of_head(head, carry):
        return _visit(bounds, partial(step, head=head), carry)

    zeros = _zeros(tile.keys, parts)
    dk_SH, dv_SH = jax.lax.fori_loop(0, q.shape[1], of_head, (zeros, zeros))
    _store(dk, [scale * x for x in dk_SH], parts)
    _store(dv, dv_SH, parts)


def _visit(bounds, step, carry):
    """step(masked, block, carry) for the blocks within the bounds, in order."""
    for border, masked in enumerate((True, False, True)):
        begin, end = bounds[border], bounds[border + 1]
        carry = jax.lax.fori_loop(begin, end, partial(step, masked), carry)
    return carry


def _visible_keys(start, tile):
    """j -> [Q, S]: the keys of block j that each query of this program's block may see."""
    block = pl.num_programs(0) - 1 - pl.program_id(0)
    start_Q1, queries_Q1 = start[...][:, None], _indices(block, tile.queries)[:, None]

    def visible(j):
        keys_1S = _indices(j, tile.keys)[None, :]
        return (start_Q1 <= keys_1S) & (keys_1S <= queries_Q1)

    return visible


def _indices(block, size):
    return block * size + jnp.arange(size, dtype=jnp.int32)


def _span(block, size):
    return pl.ds(block * size, size)


def _parts(head_size):
    """Slices that make up a head, each a power of two wide, the widest first."""
    sizes = [1 << bit for bit in reversed(range(head_size.bit_length())) if head_size >> bit & 1]
    return [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]


def _zeros(rows, parts):
    return [jnp.zeros((rows, part.stop - part.start), jnp.float32) for part in parts]


def _load(ref, rows, parts):
    rows = rows if isinstance(rows, tuple) else (rows,)
    return [ref[*rows, part] for part in parts]


def _store(ref, x_H, parts):
    for part, x in zip(parts, x_H):
        ref[:, part] = x.astype(ref.dtype)


def _dot_transposed(a_H, b_H):
    """a b^T, summed over the parts of the head."""
    return sum(_dot(a, b, 1) for a, b in zip(a_H, b_H))


def _add_products(sums_H, weights, x_H):
    """sums + weights x, part by part; the weights are rounded to the dtype of x."""
    return [total + _dot(weights.astype(x.dtype), x, 0) for total, x in zip(sums_H, x_H)]


def _dot(a, b, contracted):
    dims = (((1,), (contracted,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
