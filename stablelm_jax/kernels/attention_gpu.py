"""Flash attention inside documents for A100 and Hopper, in Pallas with the Triton backend.

After FlashAttention-2 (Dao 2023, arXiv 2307.08691): algorithm 1 forward, algorithm 2 backward, but
as two kernels: no two programs add to the same place, gradients have the same bits in every run.

B batch, T queries or keys of a row, N query heads, K key/value heads, G = N / K query heads for
each key head, H head size; of one tile, Q queries and S keys.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from stablelm_jax.kernels import attention_gpu_kernels as kernels
from stablelm_jax.kernels.attention_gpu_kernels import Tile
from stablelm_jax.kernels.device import traced_device
from stablelm_jax.kernels.documents import document_spans, key_block_bounds, query_block_bounds
from stablelm_jax.kernels.residuals import named


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The tiles of each of the three kernels."""

    forward: Tile
    keys: Tile  # for dk and dv
    queries: Tile  # for dq


# By compute capability and largest head size. These are ESTIMATES, none was measured on a chip: of
# a few tiles that compile ahead of time, those that spill no registers (ptxas; at most 100 bytes)
# and leave room for eight warps on a core. benchmarks/attention.py --tune prints what to put here.
BLOCKS = {
    "sm80": {
        64: Blocks(Tile(128, 64, 4, 3), Tile(32, 128, 8, 3), Tile(64, 64, 4, 2)),
        80: Blocks(Tile(128, 64, 8, 2), Tile(32, 128, 8, 2), Tile(128, 32, 8, 2)),
        128: Blocks(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        160: Blocks(Tile(128, 32, 8, 3), Tile(32, 64, 8, 2), Tile(128, 32, 8, 2)),
    },
    "sm90": {
        64: Blocks(Tile(128, 128, 8, 2), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2)),
        80: Blocks(Tile(128, 64, 8, 2), Tile(32, 128, 8, 2), Tile(128, 64, 8, 2)),
        128: Blocks(Tile(128, 64, 8, 2), Tile(32, 128, 8, 2), Tile(128, 64, 8, 2)),
        160: Blocks(Tile(128, 64, 8, 2), Tile(32, 64, 8, 2), Tile(128, 32, 8, 2)),
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
    start_BT, end_BT = document_spans(segment_ids_BT, padding[1])
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
        partial(kernels.forward, tile=tile),
        out_shape=(_like(q_BTNH), jax.eval_shape(_sum_of_heads, q_BTNH)),
        grid=specs.grid,
        in_specs=[specs.bounds, specs.start, specs.queries, specs.keys, specs.keys],
        out_specs=(specs.queries, specs.sums),
        name="attention_forward",
        **_options(tile, interpret),
    )(query_block_bounds(start_BT, tile), *inputs)


def _query_gradient(inputs, tile, interpret):
    start_BT, q_BTNH, k_BTKH, *_ = inputs
    specs = _QuerySpecs(q_BTNH.shape, k_BTKH.shape, tile)
    return pl.pallas_call(
        partial(kernels.query_gradient, tile=tile),
        out_shape=_like(q_BTNH),
        grid=specs.grid,
        in_specs=[specs.bounds, specs.start, specs.queries, specs.keys, specs.keys]
        + [specs.queries, specs.sums, specs.sums],
        out_specs=specs.queries,
        name="attention_query_gradient",
        **_options(tile, interpret),
    )(query_block_bounds(start_BT, tile), *inputs)


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
        partial(kernels.key_gradients, tile=tile),
        out_shape=(_like(k_BTKH), _like(k_BTKH)),
        grid=(length // tile.keys, num_keys, batch),
        in_specs=[bounds, start, queries, keys, keys, queries, sums, sums],
        out_specs=(keys, keys),
        name="attention_key_gradients",
        **_options(tile, interpret),
    )(key_block_bounds(end_BT, tile), *inputs)


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
