"""Flash attention inside documents for TPUs, in Pallas.

Forward handles a block of queries of a head at a time, backward a head's row; tiles outside a
document are never visited. Tiles that need no mask have none, and backward is one kernel that
computes the scores once for all three gradients, five products in place of seven. It keeps the
sums of a head's row in the core's vector memory, which bounds the length of a row.

Tokens stand along the 128 lanes, [H, T]. The other way round heads of 64 would fill half of them,
in memory too, and so would what XLA does before and after: biases, rotary, transposes. This way a
query's maximum and sums are a row, [1, Q], and no matrix pass is half empty.

B batch, T queries or keys of a row, N query heads, K key/value heads, G = N / K query heads for
each key head, H head size; of one tile, Q queries and S keys.
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
# the compilers say, less a tenth.
VECTOR_MEMORY = {"TPU v4": 14, "TPU v5 lite": 115, "TPU v5e": 115, "TPU v5": 57, "TPU v6": 115}


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

    Any H goes in as it is. Products of float32 run in the TPU's default precision, bfloat16,
    unless `jax.default_matmul_precision` says more.

    Args:
      tile: whole lanes; a short row takes smaller ones.
      interpret: run anywhere, slowly, for tests.
    """
    length = q_BTNH.shape[1]
    whole = -(-length // LANES) * LANES
    tile = Tile(min(tile.queries, whole), min(tile.keys, whole))
    padding = (0, -length % math.lcm(tile.queries, tile.keys))
    start_BT, end_BT = document_spans(segment_ids_BT, padding[1])
    q_BNHT, k_BKHT, v_BKHT = (
        jnp.pad(x.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), padding))
        for x in (q_BTNH, k_BTKH, v_BTKH)
    )
    o_BNHT = _flash(q_BNHT, k_BKHT, v_BKHT, start_BT, end_BT, tile, interpret)
    return o_BNHT[..., :length].transpose(0, 3, 1, 2)


def why_unsupported(device_kind: str, q_BTNH: jax.Array) -> str | None:
    """Why this chip's kernels cannot take these rows; None if they can."""
    memory = next((m for name, m in VECTOR_MEMORY.items() if name in device_kind), None)
    if memory is None:
        return f"{device_kind} has too little vector memory, or nobody has said how much"
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float32):
        return f"no matrix product for {q_BTNH.dtype}: use bfloat16 or float32"
    length, size = q_BTNH.shape[1], q_BTNH.shape[3]
    padded = -(-length // TILE.queries) * TILE.queries
    needed = _backward_memory(size, padded, q_BTNH.dtype.itemsize, TILE)
    if needed > memory << 20:
        return (
            f"a row of {length} tokens with heads of {size} needs {needed >> 20} MiB of vector "
            f"memory and {device_kind} has {memory}"
        )
    return None


def _forward_memory(size: int, length: int, itemsize: int, tile: Tile) -> int:
    """Bytes of vector memory: k and v of a row, q and o of a block, two of each at a time."""
    size = -(-size // 8) * 8
    return 4 * itemsize * size * (length + tile.queries) + _scores_memory(size, tile)


def _backward_memory(size: int, length: int, itemsize: int, tile: Tile) -> int:
    """As `_forward_memory`: seven arrays of a row and three of a number a token, and three sums."""
    size = -(-size // 8) * 8
    return ((14 * itemsize + 12) * size + 24) * length + _scores_memory(size, tile)


def _scores_memory(size: int, tile: Tile) -> int:
    """For what does not stay in registers of a tile's scores, [Q, S], and results, [H, Q]."""
    return 12 * tile.queries * (tile.keys + size)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _flash(q_BNHT, k_BKHT, v_BKHT, start_BT, end_BT, tile, interpret):
    return _flash_forward(q_BNHT, k_BKHT, v_BKHT, start_BT, end_BT, tile, interpret)[0]


def _flash_forward(q_BNHT, k_BKHT, v_BKHT, start_BT, end_BT, tile, interpret):
    o_BNHT, logsumexp = named(*_output((start_BT, q_BNHT, k_BKHT, v_BKHT), tile, interpret))
    return o_BNHT, (q_BNHT, k_BKHT, v_BKHT, start_BT, end_BT, o_BNHT, logsumexp)


def _flash_backward(tile, interpret, saved, do_BNHT):
    q_BNHT, k_BKHT, v_BKHT, start_BT, end_BT, o_BNHT, logsumexp = saved
    # The row sums of weights * dweights, without the weights.
    products = do_BNHT.astype(jnp.float32) * o_BNHT.astype(jnp.float32)
    delta = _in_blocks(jnp.sum(products, 2), tile)
    inputs = (start_BT, q_BNHT, k_BKHT, v_BKHT, do_BNHT, logsumexp, delta)
    return *_gradients(inputs, end_BT, tile, interpret), None, None


_flash.defvjp(_flash_forward, _flash_backward)


# Backward calls this again under `jax.checkpoint`, and drops it where a policy saved its results:
# jax drops a `jit` whose results nobody reads, a bare `pallas_call` it keeps.
@partial(jax.jit, static_argnums=(1, 2))
def _output(inputs, tile, interpret):
    """The result, and log-sum-exp [B, N, T / Q, 1, Q].

    The bounds go in flat: scalar memory would pad an array of several dims.
    """
    start_BT, q_BNHT, k_BKHT, v_BKHT = inputs
    batch, num_heads, size, length = q_BNHT.shape
    group, count = num_heads // k_BKHT.shape[1], length // tile.queries
    row = pl.BlockSpec((None, None, 1, tile.queries), lambda b, n, i, _: (b, i, 0, 0))
    queries = pl.BlockSpec((None, None, size, tile.queries), lambda b, n, i, _: (b, n, 0, i))
    # `//` would ask what this machine's TPU is, and fail where it compiles for another.
    keys = pl.BlockSpec(
        (None, None, size, length), lambda b, n, i, _: (b, jax.lax.div(n, group), 0, 0)
    )
    sums = pl.BlockSpec((None, None, None, 1, tile.queries), lambda b, n, i, _: (b, n, i, 0, 0))
    bounds = documents.query_block_bounds(start_BT, tile).reshape(-1)
    return pl.pallas_call(
        partial(_forward_kernel, tile=tile),
        out_shape=(
            jax.ShapeDtypeStruct(q_BNHT.shape, q_BNHT.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, count, 1, tile.queries), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, num_heads, count),
            in_specs=[row, queries, keys, keys],
            out_specs=(queries, sums),
            scratch_shapes=[
                pltpu.VMEM((height, tile.queries), jnp.float32) for height in (1, 1, size)
            ],
        ),
        name="attention_forward",
        **_options(_forward_memory(size, length, q_BNHT.dtype.itemsize, tile), interpret),
    )(bounds, _in_blocks(start_BT, tile), *inputs[1:])


def _gradients(inputs, end_BT, tile, interpret):
    start_BT, q_BNHT, k_BKHT, *_ = inputs
    batch, num_heads, size, length = q_BNHT.shape
    num_keys, count = k_BKHT.shape[1], length // tile.queries
    group = num_heads // num_keys

    # The last axis of the grid runs fastest: heads that share a key head follow each other.
    def head(b, h, g, _):
        return b, h * group + g

    row = pl.BlockSpec((None, count, 1, tile.queries), lambda b, h, g, _: (b, 0, 0, 0))
    queries = pl.BlockSpec((None, None, size, length), lambda *at: (*head(*at), 0, 0))
    keys = pl.BlockSpec((None, None, size, length), lambda b, h, g, _: (b, h, 0, 0))
    sums = pl.BlockSpec((None, None, count, 1, tile.queries), lambda *at: (*head(*at), 0, 0, 0))
    bounds = documents.key_block_bounds(end_BT, tile).reshape(-1)
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BNHT, k_BKHT, k_BKHT)]
    return pl.pallas_call(
        partial(_backward_kernel, tile=tile),
        out_shape=like,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, num_keys, group),
            in_specs=[row, queries, keys, keys, queries, sums, sums],
            out_specs=[queries, keys, keys],
            scratch_shapes=[pltpu.VMEM((size, length), jnp.float32)] * 3,
        ),
        name="attention_gradients",
        **_options(_backward_memory(size, length, q_BNHT.dtype.itemsize, tile), interpret),
    )(bounds, _in_blocks(start_BT, tile), *inputs[1:])


def _in_blocks(x_T, tile):
    """[..., T / Q, 1, Q]: a kernel reads a block of a row by its first index."""
    return x_T.reshape(*x_T.shape[:-1], -1, 1, tile.queries)


def _options(memory, interpret):
    params = pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=memory
    )
    return {"compiler_params": params, "interpret": interpret}


# The kernels. Their refs, without a suffix:
#   bounds [4 * blocks of all rows]: borders of the blocks to visit (`documents`), a scalar each.
#   start: where the document of each query starts. logsumexp: that of its scaled scores.
#   delta: the sum over H of o * do.


def _forward_kernel(bounds, start, q, k, v, o, logsumexp, maximum, total, sums, *, tile):
    """One block of queries, scores stand as [S, Q]: q, o [H, Q]; k, v [H, T]; others [1, Q].

    Scratch, float32: maximum [1, Q] of the scores, total [1, Q] of their powers of two; sums
    [H, Q].
    """
    block, num_blocks = pl.program_id(2), pl.num_programs(2)
    exponent = _LOG2_E / math.sqrt(q.shape[0])
    maximum[...] = jnp.full(maximum.shape, _LOWEST, jnp.float32)
    total[...] = jnp.zeros(total.shape, jnp.float32)
    sums[...] = jnp.zeros(sums.shape, jnp.float32)
    queries_1Q = block * tile.queries + _iota((1, tile.queries), 1)

    def step(masked, j, _):
        keys = _span(j, tile.keys)
        scores_SQ = exponent * _dot(k[:, keys], q[...], 0, 0)
        if masked:
            keys_S1 = j * tile.keys + _iota((tile.keys, 1), 0)
            visible_SQ = (start[...] <= keys_S1) & (keys_S1 <= queries_1Q)
            scores_SQ = jnp.where(visible_SQ, scores_SQ, -jnp.inf)
        before_1Q = maximum[...]
        after_1Q = jnp.maximum(before_1Q, jnp.max(scores_SQ, 0, keepdims=True))
        weights_SQ = jnp.exp2(scores_SQ - after_1Q)
        shrink_1Q = jnp.exp2(before_1Q - after_1Q)
        maximum[...] = after_1Q
        total[...] = total[...] * shrink_1Q + jnp.sum(weights_SQ, 0, keepdims=True)
        added_HQ = _dot(v[:, keys], weights_SQ.astype(v.dtype), 1, 0)
        sums[...] = sums[...] * shrink_1Q + added_HQ

    _visit(bounds, pl.program_id(0) * num_blocks + block, step)
    o[...] = (sums[...] / total[...]).astype(o.dtype)
    logsumexp[...] = maximum[...] / _LOG2_E + jnp.log(total[...])


def _backward_kernel(
    bounds, start, q, k, v, do, logsumexp, delta, dq, dk, dv, dq_sum, dk_sum, dv_sum, *, tile
):
    """One query head's row, the heads of a key head in turn; scores stand as [S, Q].

    q, k, v, do, dq, dk, dv [H, T]; start, logsumexp, delta [T / Q, 1, Q]. Scratch, float32: the
    sums [H, T], those of keys over all heads that share them.
    """
    head, num_heads = pl.program_id(2), pl.num_programs(2)
    scale = 1 / math.sqrt(q.shape[0])
    num_blocks = k.shape[1] // tile.keys
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
            q_HQ, do_HQ, k_HS = q[:, queries], do[:, queries], k[:, keys]
            scores_SQ = (scale * _LOG2_E) * _dot(k_HS, q_HQ, 0, 0)
            weights_SQ = jnp.exp2(scores_SQ - _LOG2_E * logsumexp[i])
            if masked:
                queries_1Q = i * tile.queries + _iota((1, tile.queries), 1)
                visible_SQ = (start[i] <= keys_S1) & (keys_S1 <= queries_1Q)
                weights_SQ = jnp.where(visible_SQ, weights_SQ, 0.0)
            dv_sum[:, keys] += _dot(do_HQ, weights_SQ.astype(do_HQ.dtype), 1, 1)
            dweights_SQ = _dot(v[:, keys], do_HQ, 0, 0)
            dscores_SQ = (weights_SQ * (dweights_SQ - delta[i])).astype(q_HQ.dtype)
            dk_sum[:, keys] += _dot(q_HQ, dscores_SQ, 1, 1)
            dq_sum[:, queries] += _dot(k_HS, dscores_SQ, 1, 0)

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


def _dot(a, b, of_a, of_b):
    dims = (((of_a,), (of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
