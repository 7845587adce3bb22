"""Flash attention inside documents for A100 and Hopper, in Pallas with the Triton backend.

After FlashAttention-2 (Dao 2023, arXiv 2307.08691): algorithm 1 forward, algorithm 2 backward, but
as two kernels: no two programs add to the same place, gradients have the same bits in every run.

Sizes of Triton's arrays are powers of two. A head of 80 or 160 is handled as parts of 64 + 16 or
128 + 32, each with a product of its own: padded to 128 or 256 it would cost 1.6 times the matrix
work, registers and shared memory.

B batch, T queries or keys of a row, N query heads, K key/value heads, G = N / K query heads for
each key head, H head size; of one tile, Q queries and S keys. In the kernels, lists under a name in
H hold the parts of a head.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from stablelm_jax.kernels import documents
from stablelm_jax.kernels.device import traced_device
from stablelm_jax.kernels.residuals import named

_LOG2_E = math.log2(math.e)
# Below any score, and finite: the maximum of a row that has seen no key yet.
_LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class Tile(documents.Tile):
    """Size of one kernel's tiles and how its programs run.

    Attributes:
      queries, keys: powers of two, at least the matrix instructions' 16.
      warps: how many a program has. stages: one more than the tiles that its loops load ahead.
      one_loop: over all tiles, a branch around the mask; it loads ahead from end to end. Otherwise
        three loops, with a mask, without and with: on an A100 the branch costs registers.
    """

    warps: int
    stages: int
    one_loop: bool = False


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The tiles of each of the three kernels."""

    forward: Tile
    keys: Tile  # for dk and dv
    queries: Tile  # for dq


_WIDE = Tile(128, 64, 8, 3, one_loop=True)
# By compute capability and largest head size. These are ESTIMATES, none was measured on a chip: of
# some tiles for each those with the best bounds (benchmarks/attention.py --aot) that store at most
# 100 bytes of registers, none in a loop. benchmarks/attention.py --tune prints what to put here.
BLOCKS = {
    "sm80": {
        64: Blocks(Tile(128, 64, 4, 3), Tile(32, 128, 4, 3), Tile(128, 32, 4, 3)),
        80: Blocks(Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(128, 32, 4, 3)),
        128: Blocks(Tile(128, 32, 4, 3), Tile(32, 128, 8, 3), Tile(128, 64, 8, 3)),
        160: Blocks(Tile(128, 64, 8, 3), Tile(32, 64, 4, 2), Tile(128, 32, 8, 3)),
    },
    "sm90": {
        64: Blocks(Tile(64, 128, 4, 3, True), Tile(64, 64, 4, 3, True), _WIDE),
        80: Blocks(_WIDE, Tile(64, 64, 4, 3, True), _WIDE),
        128: Blocks(_WIDE, Tile(64, 128, 8, 3, True), _WIDE),
        160: Blocks(_WIDE, Tile(64, 128, 8, 3, True), _WIDE),
    },
}

# float32 takes twice the shared memory.
_FLOAT32_BLOCKS = Blocks(*3 * [Tile(32, 32, 4, 2)])

# Parts of jax's device_kind, as in "NVIDIA A100-SXM4-40GB" or "NVIDIA H100 80GB HBM3".
_CHIPS = {"sm80": ("A100", "A800"), "sm90": ("H100", "H200", "H800", "H20")}


def pallas_gpu(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As `attention.attention`; the same id further on in a row is another document.

    On a GPU products of float32 are TF32, as elsewhere in jax, unless jax_default_matmul_precision
    says "highest": then compiling takes minutes.

    Args:
      blocks: sizes of tiles; by default those of BLOCKS for this machine's GPU.
      interpret: compute with the CPU what the GPU would, for tests.

    Raises:
      ValueError: for inputs that the kernels cannot take, see `why_unsupported`.
    """
    if reason := why_unsupported(q_BTNH, k_BTKH):
        raise ValueError(f"attention on GPUs: {reason}")
    blocks = blocks or blocks_for(q_BTNH.shape[3], q_BTNH.dtype)
    length = q_BTNH.shape[1]
    # Padding keeps every test for the row's end out of the kernels' loops; training rows need none.
    multiple = max(max(t.queries, t.keys) for t in (blocks.forward, blocks.keys, blocks.queries))
    padding = (0, -length % multiple)
    q_BTNH, k_BTKH, v_BTKH = (
        jnp.pad(x, ((0, 0), padding, (0, 0), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKH)
    )
    start_BT, end_BT = documents.document_spans(segment_ids_BT, padding[1])
    return _flash(q_BTNH, k_BTKH, v_BTKH, start_BT, end_BT, blocks, interpret)[:, :length]


def why_unsupported(q_BTNH: jax.Array, k_BTKH: jax.Array) -> str | None:
    """Why the kernels cannot take these queries and keys; None if they can."""
    heads, head_size = q_BTNH.shape[2:]
    if head_size % 16 or not 16 <= head_size <= 160:  # an A100 cannot hold the tiles of 256
        return f"head size {head_size} is no multiple of 16 from 16 to 160"
    if heads % k_BTKH.shape[2]:
        return f"{heads} query heads cannot share {k_BTKH.shape[2]} key heads"
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"no matrix product for {q_BTNH.dtype}: use bfloat16, float16 or float32"
    return None


def blocks_for(head_size: int, dtype=jnp.bfloat16, generation: str | None = None) -> Blocks:
    """The row of BLOCKS for a head size; by default for the GPU that the trace is for.

    Any other device gets A100's, whose tiles need the least shared memory.
    """
    if dtype == jnp.float32:
        return _FLOAT32_BLOCKS
    if generation is None:
        generation = generation_of(traced_device().device_kind) or "sm80"
    sizes = BLOCKS[generation]
    return sizes[min(size for size in sizes if size >= head_size)]


def generation_of(device_kind: str) -> str | None:
    """The compute capability that BLOCKS has a table for; None for a device it has none for."""
    known = (name for name, chips in _CHIPS.items() if any(chip in device_kind for chip in chips))
    return next(known, None)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _flash(q_BTNH, k_BTKH, v_BTKH, start_BT, end_BT, blocks, interpret):
    return _flash_forward(q_BTNH, k_BTKH, v_BTKH, start_BT, end_BT, blocks, interpret)[0]


def _flash_forward(q_BTNH, k_BTKH, v_BTKH, start_BT, end_BT, blocks, interpret):
    inputs = (start_BT, q_BTNH, k_BTKH, v_BTKH)
    o_BTNH, logsumexp_BNT = named(*_output(inputs, blocks.forward, interpret))
    return o_BTNH, (q_BTNH, k_BTKH, v_BTKH, start_BT, end_BT, o_BTNH, logsumexp_BNT)


def _flash_backward(blocks, interpret, saved, do_BTNH):
    q_BTNH, k_BTKH, v_BTKH, start_BT, end_BT, o_BTNH, logsumexp_BNT = saved
    # The row sums of weights * dweights, without the weights.
    products = do_BTNH.astype(jnp.float32) * o_BTNH.astype(jnp.float32)
    inputs = (start_BT, q_BTNH, k_BTKH, v_BTKH, do_BTNH, logsumexp_BNT, _sum_of_heads(products))
    dk_BTKH, dv_BTKH = _key_gradients(inputs, end_BT, blocks.keys, interpret)
    dq_BTNH = _query_gradient(inputs, blocks.queries, interpret)
    return dq_BTNH, dk_BTKH, dv_BTKH, None, None


_flash.defvjp(_flash_forward, _flash_backward)


# Backward calls this again under `jax.checkpoint`, and drops it where a policy saved its results:
# jax drops a `jit` whose results nobody reads, a bare `pallas_call` it keeps.
@partial(jax.jit, static_argnums=(1, 2))
def _output(inputs, tile, interpret):
    start_BT, q_BTNH, k_BTKH, _ = inputs
    specs = _QuerySpecs(q_BTNH.shape, k_BTKH.shape, tile)
    return pl.pallas_call(
        partial(_forward_kernel, tile=tile, interpret=interpret),
        out_shape=(_like(q_BTNH), jax.eval_shape(_sum_of_heads, q_BTNH)),
        grid=specs.grid,
        in_specs=[specs.bounds, specs.start, specs.queries, specs.keys, specs.keys],
        out_specs=(specs.queries, specs.sums),
        name="attention_forward",
        **_options(tile, interpret),
    )(documents.query_block_bounds(start_BT, tile), *inputs)


def _query_gradient(inputs, tile, interpret):
    start_BT, q_BTNH, k_BTKH, *_ = inputs
    specs = _QuerySpecs(q_BTNH.shape, k_BTKH.shape, tile)
    return pl.pallas_call(
        partial(_query_gradient_kernel, tile=tile, interpret=interpret),
        out_shape=_like(q_BTNH),
        grid=specs.grid,
        in_specs=[specs.bounds, specs.start, specs.queries, specs.keys, specs.keys]
        + [specs.queries, specs.sums, specs.sums],
        out_specs=specs.queries,
        name="attention_query_gradient",
        **_options(tile, interpret),
    )(documents.query_block_bounds(start_BT, tile), *inputs)


def _key_gradients(inputs, end_BT, tile, interpret):
    _, q_BTNH, k_BTKH, *_ = inputs
    batch, length, num_keys, head_size = k_BTKH.shape
    group = q_BTNH.shape[2] // num_keys
    bounds = pl.BlockSpec((None, None, 4), lambda j, h, b: (b, j, 0))
    start = pl.BlockSpec((None, length), lambda j, h, b: (b, 0))
    queries = pl.BlockSpec((None, length, group, head_size), lambda j, h, b: (b, 0, h, 0))
    keys = pl.BlockSpec((None, tile.keys, None, head_size), lambda j, h, b: (b, j, h, 0))
    sums = pl.BlockSpec((None, group, length), lambda j, h, b: (b, h, 0))
    return pl.pallas_call(
        partial(_key_gradients_kernel, tile=tile, interpret=interpret),
        out_shape=(_like(k_BTKH), _like(k_BTKH)),
        grid=(length // tile.keys, num_keys, batch),
        in_specs=[bounds, start, queries, keys, keys, queries, sums, sums],
        out_specs=(keys, keys),
        name="attention_key_gradients",
        **_options(tile, interpret),
    )(documents.key_block_bounds(end_BT, tile), *inputs)


class _QuerySpecs:
    """What a program sees of the arrays, if its output is a block of one head's queries.

    The first axis of the grid runs fastest, so that programs at work together share keys.
    """

    def __init__(self, q_shape, k_shape, tile):
        batch, length, num_heads, head_size = q_shape
        group = num_heads // k_shape[2]
        count = length // tile.queries
        self.grid = (count, num_heads, batch)

        def of_block(shape, index):
            # The last block sees the most keys: the longest work is begun first.
            return pl.BlockSpec(shape, lambda i, n, b: index(count - 1 - i, n, b))

        self.bounds = of_block((None, None, 4), lambda i, n, b: (b, i, 0))
        self.start = of_block((None, tile.queries), lambda i, n, b: (b, i))
        self.queries = of_block((None, tile.queries, None, head_size), lambda i, n, b: (b, i, n, 0))
        self.keys = of_block((None, length, None, head_size), lambda i, n, b: (b, 0, n // group, 0))
        self.sums = of_block((None, None, tile.queries), lambda i, n, b: (b, n, i))


def _like(x):
    return jax.eval_shape(lambda x: x, x)


def _sum_of_heads(x_BTNH):
    """The sum over H, float32 [B, N, T]: so a head's block of queries lies in one piece."""
    return jnp.swapaxes(jnp.sum(x_BTNH, -1, dtype=jnp.float32), 1, 2)


def _options(tile, interpret):
    params = triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
    return {"compiler_params": params, "interpret": interpret}


# The kernels: a program makes a block of one output, and no other writes there. Their refs:
#   bounds [4]: borders of the blocks to visit. start: where the document of each query starts.
#   logsumexp: of a query's scaled scores, to base 2, negated. delta: the sum over H of o * do.


def _forward_kernel(bounds, start, q, k, v, o, logsumexp, *, tile, interpret):
    parts, exponent = parts_of(q.shape[1]), _exponent(q)
    q_QH, visible = _load(q, slice(None), parts), _visible_keys(start, tile)

    def step(masked, j, carry):
        maximum_Q, total_Q, o_QH = carry  # the maximum is one of exponent * scores
        keys = _span(j, tile.keys)
        scores_QS = _dot_transposed(q_QH, _load(k, keys, parts))
        scores_QS = _mask(masked, scores_QS, partial(visible, j), -jnp.inf)
        new_maximum_Q = jnp.maximum(maximum_Q, exponent * jnp.max(scores_QS, 1))
        weights_QS = _exp2(exponent, scores_QS, -new_maximum_Q[:, None], interpret)
        shrink_Q = _exp2(1.0, maximum_Q, -new_maximum_Q, interpret)
        total_Q = total_Q * shrink_Q + jnp.sum(weights_QS, 1)
        o_QH = [x * shrink_Q[:, None] for x in o_QH]
        o_QH = _add_products(o_QH, weights_QS, _load(v, keys, parts))
        return new_maximum_Q, total_Q, o_QH

    zeros_Q = jnp.zeros(tile.queries, jnp.float32)
    carry = (zeros_Q + _LOWEST, zeros_Q, _zeros(tile.queries, parts))
    maximum_Q, total_Q, o_QH = _visit(bounds, step, carry, tile)
    _store(o, [x / total_Q[:, None] for x in o_QH], parts)
    logsumexp[...] = -(maximum_Q + jnp.log2(total_Q))


def _query_gradient_kernel(bounds, start, q, k, v, do, logsumexp, delta, dq, *, tile, interpret):
    parts, exponent = parts_of(q.shape[1]), _exponent(q)
    q_QH, do_QH = _load(q, slice(None), parts), _load(do, slice(None), parts)
    logsumexp_Q1, delta_Q1 = logsumexp[...][:, None], delta[...][:, None]
    visible = _visible_keys(start, tile)

    def step(masked, j, dq_QH):
        keys = _span(j, tile.keys)
        k_SH = _load(k, keys, parts)
        weights_QS = _exp2(exponent, _dot_transposed(q_QH, k_SH), logsumexp_Q1, interpret)
        weights_QS = _mask(masked, weights_QS, partial(visible, j), 0.0)
        dweights_QS = _dot_transposed(do_QH, _load(v, keys, parts), -delta_Q1)
        return _add_products(dq_QH, weights_QS * dweights_QS, k_SH)

    dq_QH = _visit(bounds, step, _zeros(tile.queries, parts), tile)
    _store(dq, [exponent / _LOG2_E * x for x in dq_QH], parts)


def _key_gradients_kernel(bounds, start, q, k, v, do, logsumexp, delta, dk, dv, *, tile, interpret):
    """Scores stand as [S, Q] here: as they come out they go into the next product."""
    parts, exponent = parts_of(k.shape[1]), _exponent(k)
    k_SH, v_SH = _load(k, slice(None), parts), _load(v, slice(None), parts)
    keys_S1 = _indices(pl.program_id(0), tile.keys)[:, None]

    def step(masked, i, carry, head):
        dk_SH, dv_SH = carry
        queries = _span(i, tile.queries)
        q_QH, do_QH = _load(q, (queries, head), parts), _load(do, (queries, head), parts)

        def visible():
            queries_1Q = _indices(i, tile.queries)[None, :]
            return _is_visible(start[queries][None, :], queries_1Q, keys_S1)

        scores_SQ = _dot_transposed(k_SH, q_QH)
        weights_SQ = _exp2(exponent, scores_SQ, logsumexp[head, queries][None, :], interpret)
        weights_SQ = _mask(masked, weights_SQ, visible, 0.0)
        dv_SH = _add_products(dv_SH, weights_SQ, do_QH)
        dweights_SQ = _dot_transposed(v_SH, do_QH)
        dscores_SQ = weights_SQ * (dweights_SQ - delta[head, queries][None, :])
        return _add_products(dk_SH, dscores_SQ, q_QH), dv_SH

    def of_head(head, carry):
        return _visit(bounds, partial(step, head=head), carry, tile)

    zeros = _zeros(tile.keys, parts)
    dk_SH, dv_SH = jax.lax.fori_loop(0, q.shape[1], of_head, (zeros, zeros))
    _store(dk, [exponent / _LOG2_E * x for x in dk_SH], parts)
    _store(dv, dv_SH, parts)


def _visit(bounds, step, carry, tile):
    """step(masked, block, carry) for the blocks within the bounds, in order."""
    begin, whole_begin, whole_end, end = (bounds[border] for border in range(4))

    def turn(block, carry):
        return step((block < whole_begin) | (whole_end <= block), block, carry)

    if tile.one_loop:
        return jax.lax.fori_loop(begin, end, turn, carry)
    carry = jax.lax.fori_loop(begin, whole_begin, partial(step, True), carry)
    carry = jax.lax.fori_loop(whole_begin, whole_end, partial(step, False), carry)
    return jax.lax.fori_loop(whole_end, end, partial(step, True), carry)


def _mask(masked, x, visible, otherwise):
    """x; if masked (a bool, or one that is computed) only where visible(), else `otherwise`."""
    selected = lambda: jnp.where(visible(), x, otherwise)  # noqa: E731
    if isinstance(masked, bool):
        return selected() if masked else x
    return jax.lax.cond(masked, selected, lambda: x)


def _exponent(x):
    """exp(x / sqrt(H)) is exp2(exponent * x): the chip has an instruction for powers of two."""
    return _LOG2_E / math.sqrt(x.shape[1])


def _exp2(factor, x, shift, interpret):
    """exp2(factor * x + shift) in two instructions: of jnp's the compilers make four or more.

    On a GPU numbers below the smallest normal one are 0.
    """
    shift = jnp.broadcast_to(shift, x.shape)
    if interpret:
        return jnp.exp2(factor * x + shift)
    fma = f"fma.rn.ftz.f32 power, $1, 0f{np.float32(factor).view(np.uint32):08X}, $2;"
    ptx = f"{{ .reg .f32 power; {fma} ex2.approx.ftz.f32 $0, power; }}"
    types = dict(constraints="=f,f,f", pack=1, result_shape_dtypes=[jax.typeof(x)])
    return triton.elementwise_inline_asm(ptx, args=[x, shift], **types)[0]


def _visible_keys(start, tile):
    """j -> [Q, S]: the keys of block j that each query of this program's block may see."""
    block = pl.num_programs(0) - 1 - pl.program_id(0)
    start_Q1, queries_Q1 = start[...][:, None], _indices(block, tile.queries)[:, None]
    return lambda j: _is_visible(start_Q1, queries_Q1, _indices(j, tile.keys)[None, :])


def _is_visible(start, query, key):
    """start <= key <= query in one comparison: as unsigned, numbers below 0 are large."""
    return (query - key).astype(jnp.uint32) <= (query - start).astype(jnp.uint32)


def _indices(block, size):
    return block * size + jnp.arange(size, dtype=jnp.int32)


def _span(block, size):
    return pl.ds(block * size, size)


def parts_of(width: int) -> list[slice]:
    """Slices that make up a head or a row, each a power of two wide, the widest first."""
    sizes = [1 << bit for bit in reversed(range(width.bit_length())) if width >> bit & 1]
    return [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]


def _zeros(rows, parts):
    return [jnp.zeros((rows, part.stop - part.start), jnp.float32) for part in parts]


def _load(ref, rows, parts):
    rows = rows if isinstance(rows, tuple) else (rows,)
    return [ref[*rows, part] for part in parts]


def _store(ref, x_H, parts):
    for part, x in zip(parts, x_H):
        ref[:, part] = x.astype(ref.dtype)


def _dot_transposed(a_H, b_H, start=0.0):
    """start + a b^T, summed over the parts of the head; a start a row costs nothing."""
    return sum((_dot(a, b, 1) for a, b in zip(a_H, b_H)), start)


def _add_products(sums_H, weights, x_H):
    """sums + weights x, part by part; the weights are rounded to the dtype of x."""
    return [total + _dot(weights.astype(x.dtype), x, 0) for total, x in zip(sums_H, x_H)]


def _dot(a, b, contracted):
    dims = (((1,), (contracted,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
