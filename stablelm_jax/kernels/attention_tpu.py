"""Flash attention inside documents for TPUs, in Pallas.

Forward handles a block of queries of a head at a time, backward a head's row; tiles outside a
document are never visited. A tile costs a TPU its matrix passes, half empty for heads of 64, as
long as the vector unit does less than that: so tiles that need no mask have none, and backward is
one kernel that computes the scores once for all three gradients, five products in place of seven.
It keeps the sums of a head's row in the core's vector memory, which bounds the length of a row.

B batch, T queries or keys of a row, N query heads, K key/value heads, G = N / K query heads for
each key head, H head size, L = 128 lanes; of one tile, Q queries and S keys. In the kernels a
number of each query stands in all lanes of its row, [Q, L], or along the lanes, [1, Q].
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from stablelm_jax.kernels import documents
from stablelm_jax.kernels.documents import Tile, document_spans
from stablelm_jax.kernels.residuals import named

LANES = 128
_LOG2_E = math.log2(math.e)
# Below any score, and finite: the maximum of a row that has seen no key yet.
_LOWEST = -1e30

# For forward and backward. By the compilers' bundles for v5e, v5p and v6e, larger tiles cost 5 to
# 15 % less for each pair of query and key, but visit as much more of the triangle, and still more
# where documents are short.
TILE = Tile(512, 512)

# The vector memory of a core, in MiB, that a kernel may fill, by a part of jax's device_kind: what
# the compilers say, less a tenth. A v4 has 16, too little for a head's row of 4,096 tokens.
VECTOR_MEMORY = {"TPU v5 lite": 115, "TPU v5e": 115, "TPU v5": 57, "TPU v6": 115}


def pallas_tpu(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    tile: Tile = TILE,
    interpret: bool = False,
) -> jax.Array:
    """As `attention.attention`; the same id further on in a row is another document.

    Any H goes in as it is, in whole 128 lanes. Products of float32 run in the TPU's default
    precision, bfloat16, unless `jax.default_matmul_precision` says more.

    Args:
      tile: whole lanes; a short row takes smaller ones.
      interpret: run anywhere, slowly, for tests.
    """
    length = q_BTNH.shape[1]
    whole = -(-length // LANES) * LANES
    tile = Tile(min(tile.queries, whole), min(tile.keys, whole))
    padding = (0, -length % math.lcm(tile.queries, tile.keys))
    start_BT, end_BT = document_spans(segment_ids_BT, padding[1])
    q_BNTH, k_BKTH, v_BKTH = (
        jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), padding, (0, 0)))
        for x in (q_BTNH, k_BTKH, v_BTKH)
    )
    o_BNTH = _flash(q_BNTH, k_BKTH, v_BKTH, start_BT, end_BT, tile, interpret)
    return jnp.swapaxes(o_BNTH, 1, 2)[:, :length]


def why_unsupported(device_kind: str, q_BTNH: jax.Array) -> str | None:
    """Why this chip's kernels cannot take these rows; None if they can."""
    memory = next((m for name, m in VECTOR_MEMORY.items() if name in device_kind), None)
    if memory is None:
        return f"{device_kind} has too little vector memory, or nobody has said how much"
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float32):
        return f"no matrix product for {q_BTNH.dtype}: use bfloat16 or float32"
    length, size = q_BTNH.shape[1], q_BTNH.shape[3]
    padded = -(-length // TILE.queries) * TILE.queries
    values = padded * -(-size // LANES) * LANES
    # Seven arrays come and go, two of each at a time; three float32 sums; a tile's scores.
    needed = values * (14 * q_BTNH.dtype.itemsize + 12) + 24 * TILE.queries * TILE.keys
    if needed > memory << 20:
        return (
            f"a row of {length} tokens with heads of {size} needs {needed >> 20} MiB of vector "
            f"memory and {device_kind} has {memory}"
        )
    return None


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _flash(q_BNTH, k_BKTH, v_BKTH, start_BT, end_BT, tile, interpret):
    return _flash_forward(q_BNTH, k_BKTH, v_BKTH, start_BT, end_BT, tile, interpret)[0]


def _flash_forward(q_BNTH, k_BKTH, v_BKTH, start_BT, end_BT, tile, interpret):
    o_BNTH, logsumexp = named(*_output((start_BT, q_BNTH, k_BKTH, v_BKTH), tile, interpret))
    return o_BNTH, (q_BNTH, k_BKTH, v_BKTH, start_BT, end_BT, o_BNTH, logsumexp)


def _flash_backward(tile, interpret, saved, do_BNTH):
    q_BNTH, k_BKTH, v_BKTH, start_BT, end_BT, o_BNTH, logsumexp = saved
    # The row sums of weights * dweights, without the weights.
    products = do_BNTH.astype(jnp.float32) * o_BNTH.astype(jnp.float32)
    delta = _in_blocks(jnp.sum(products, -1), tile)
    inputs = (start_BT, q_BNTH, k_BKTH, v_BKTH, do_BNTH, logsumexp, delta)
    return *_gradients(inputs, end_BT, tile, interpret), None, None


_flash.defvjp(_flash_forward, _flash_backward)


# Backward calls this again under `jax.checkpoint`, and drops it where a policy saved its results:
# jax drops a `jit` whose results nobody reads, a bare `pallas_call` it keeps.
@partial(jax.jit, static_argnums=(1, 2))
def _output(inputs, tile, interpret):
    """The result, and log-sum-exp [B, N, T / Q, 1, Q].

    The bounds go in flat: scalar memory would pad an array of several dims.
    """
    start_BT, q_BNTH, k_BKTH, v_BKTH = inputs
    batch, num_heads, length, size = q_BNTH.shape
    group, count = num_heads // k_BKTH.shape[1], length // tile.queries
    row = pl.BlockSpec((None, None, 1, tile.queries), lambda b, n, i, _: (b, i, 0, 0))
    queries = pl.BlockSpec((None, None, tile.queries, size), lambda b, n, i, _: (b, n, i, 0))
    # `//` would ask what this machine's TPU is, and fail where it compiles for another.
    keys = pl.BlockSpec(
        (None, None, length, size), lambda b, n, i, _: (b, jax.lax.div(n, group), 0, 0)
    )
    sums = pl.BlockSpec((None, None, None, 1, tile.queries), lambda b, n, i, _: (b, n, i, 0, 0))
    bounds = documents.query_block_bounds(start_BT, tile).reshape(-1)
    return pl.pallas_call(
        partial(_forward_kernel, tile=tile),
        out_shape=(
            jax.ShapeDtypeStruct(q_BNTH.shape, q_BNTH.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, count, 1, tile.queries), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, num_heads, count),
            in_specs=[row, queries, keys, keys],
            out_specs=(queries, sums),
            scratch_shapes=[
                pltpu.VMEM((tile.queries, width), jnp.float32) for width in (LANES, LANES, size)
            ],
        ),
        name="attention_forward",
        **_options(q_BNTH, interpret),
    )(bounds, _in_blocks(start_BT, tile), *inputs[1:])


def _gradients(inputs, end_BT, tile, interpret):
    start_BT, q_BNTH, k_BKTH, *_ = inputs
    batch, num_heads, length, size = q_BNTH.shape
    num_keys, count = k_BKTH.shape[1], length // tile.queries
    group = num_heads // num_keys

    # The last axis of the grid runs fastest: heads that share a key head follow each other.
    def head(b, h, g, _):
        return b, h * group + g

    row = pl.BlockSpec((None, count, 1, tile.queries), lambda b, h, g, _: (b, 0, 0, 0))
    queries = pl.BlockSpec((None, None, length, size), lambda *at: (*head(*at), 0, 0))
    keys = pl.BlockSpec((None, None, length, size), lambda b, h, g, _: (b, h, 0, 0))
    sums = pl.BlockSpec((None, None, count, 1, tile.queries), lambda *at: (*head(*at), 0, 0, 0))
    bounds = documents.key_block_bounds(end_BT, tile).reshape(-1)
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BNTH, k_BKTH, k_BKTH)]
    return pl.pallas_call(
        partial(_backward_kernel, tile=tile),
        out_shape=like,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, num_keys, group),
            in_specs=[row, queries, keys, keys, queries, sums, sums],
            out_specs=[queries, keys, keys],
            scratch_shapes=[pltpu.VMEM((length, size), jnp.float32)] * 3,
        ),
        name="attention_gradients",
        **_options(q_BNTH, interpret),
    )(bounds, _in_blocks(start_BT, tile), *inputs[1:])


def _in_blocks(x_T, tile):
    """[..., T / Q, 1, Q]: a kernel reads a block of a row by its first index."""
    return x_T.reshape(*x_T.shape[:-1], -1, 1, tile.queries)


def _options(q_BNTH, interpret):
    memory = max(VECTOR_MEMORY.values()) << 20  # a limit, not a claim
    params = pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=memory
    )
    return {"compiler_params": params, "interpret": interpret}


# The kernels. Their refs, without a suffix:
#   bounds [4 * blocks of all rows]: borders of the blocks to visit (`documents`), a scalar each.
#   start: where the document of each query starts. logsumexp: that of its scaled scores.
#   delta: the sum over H of o * do.


def _forward_kernel(bounds, start, q, k, v, o, logsumexp, maximum, total, sums, *, tile):
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


def _backward_kernel(
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
