"""Flash attention inside documents for Hopper, in Pallas with the Mosaic GPU backend.

As `attention_gpu`, with what only Hopper has: one warpgroup of a program does nothing but load
(TMA), two others multiply and exponentiate, after FlashAttention-3 (Shah et al. 2024, arXiv
2407.08608). Two kernels backward: no two programs add to the same place, gradients have the same
bits in every run.

B batch, T queries or keys of a row, N query heads, K key/value heads, H head size.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from stablelm_jax.kernels import attention_mosaic_kernels as kernels
from stablelm_jax.kernels import documents
from stablelm_jax.kernels.attention_gpu import Blocks, generation_of
from stablelm_jax.kernels.attention_mosaic_kernels import CONSUMERS, ROWS
from stablelm_jax.kernels.device import traced_device
from stablelm_jax.kernels.residuals import named

_BLOCK = CONSUMERS * ROWS


@dataclasses.dataclass(frozen=True)
class Tile:
    """streamed: keys (for dk and dv: queries) that consumers read at a time, 64 or 128.

    stages: tiles that shared memory holds. turns: forward, consumers start products by turns.
    """

    streamed: int
    stages: int
    turns: bool = False


# By head size. These are ESTIMATES, none was measured on a chip: the largest that spill at most a
# few registers and fit in shared memory.
TILES = {
    64: Blocks(forward=Tile(128, 4, turns=True), keys=Tile(64, 4), queries=Tile(128, 3)),
    128: Blocks(forward=Tile(128, 3, turns=True), keys=Tile(64, 2), queries=Tile(64, 4)),
}


def pallas_mosaic(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    tiles: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As `attention.attention`; the same id further on in a row is another document.

    Args:
      tiles: `Tile`s for the three kernels; by default those of TILES for the head size.
      interpret: compute with the CPU what the GPU would, for tests; needs jax 0.12.

    Raises:
      ValueError: for another chip than Hopper, or inputs that the kernels cannot take.
    """
    if reason := why_unsupported(q_BTNH):
        raise ValueError(
            f"attention 'pallas_mosaic': {reason}; config.training.attention='auto' can"
        )
    kind = traced_device().device_kind
    if not interpret and generation_of(kind) != "sm90":
        raise ValueError(
            f"attention 'pallas_mosaic' is for Hopper GPUs, this is {kind}: "
            "choose config.training.attention='auto'"
        )
    length = q_BTNH.shape[1]
    padding = (0, -length % _BLOCK)
    q_BTNH, k_BTKH, v_BTKH = (
        jnp.pad(x, ((0, 0), padding, (0, 0), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKH)
    )
    spans = documents.document_spans(segment_ids_BT, padding[1])
    tiles = tiles or TILES[q_BTNH.shape[3]]
    return _flash(q_BTNH, k_BTKH, v_BTKH, *spans, tiles, interpret)[:, :length]


def why_unsupported(q_BTNH: jax.Array) -> str | None:
    """Why the kernels cannot take these queries; None if they can."""
    if q_BTNH.shape[3] not in TILES:
        return f"it has no tiles for heads of {q_BTNH.shape[3]}, only for {list(TILES)}"
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, not in {q_BTNH.dtype}"
    return None


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _flash(q_BTNH, k_BTKH, v_BTKH, start_BT, end_BT, tiles, interpret):
    return _flash_forward(q_BTNH, k_BTKH, v_BTKH, start_BT, end_BT, tiles, interpret)[0]


def _flash_forward(q_BTNH, k_BTKH, v_BTKH, start_BT, end_BT, tiles, interpret):
    outputs = _output(start_BT, (q_BTNH, k_BTKH, v_BTKH), tiles.forward, interpret)
    o_BTNH, logsumexp_BNT = named(*outputs)
    return o_BTNH, (q_BTNH, k_BTKH, v_BTKH, start_BT, end_BT, o_BTNH, logsumexp_BNT)


def _flash_backward(tiles, interpret, saved, do_BTNH):
    q_BTNH, k_BTKH, v_BTKH, start_BT, end_BT, o_BTNH, logsumexp_BNT = saved
    # The row sums of weights * dweights, without the weights.
    products = do_BTNH.astype(jnp.float32) * o_BTNH.astype(jnp.float32)
    delta_BNT = jnp.swapaxes(jnp.sum(products, -1), 1, 2)
    inputs = (q_BTNH, k_BTKH, v_BTKH, do_BTNH, logsumexp_BNT, delta_BNT)
    bounds = documents.key_block_bounds(end_BT, documents.Tile(tiles.keys.streamed, ROWS))
    inputs_of_keys = (bounds, end_BT, *inputs)
    dk_BTKH, dv_BTKH = _launch(
        kernels.key_gradients, inputs_of_keys, (k_BTKH, v_BTKH), tiles.keys, interpret
    )
    inputs_of_queries = (_query_bounds(start_BT, tiles.queries), start_BT, *inputs)
    (dq_BTNH,) = _launch(
        kernels.query_gradient, inputs_of_queries, (q_BTNH,), tiles.queries, interpret
    )
    return dq_BTNH, dk_BTKH, dv_BTKH, None, None


_flash.defvjp(_flash_forward, _flash_backward)


# Backward calls this again under `jax.checkpoint`, and drops it where a policy saved its results:
# jax drops a `jit` whose results nobody reads, a bare kernel it keeps.
@partial(jax.jit, static_argnums=(2, 3))
def _output(start_BT, inputs, tile, interpret):
    batch, length, num_heads, _ = inputs[0].shape
    sums_BNT = jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32)
    inputs = (_query_bounds(start_BT, tile), start_BT, *inputs)
    return _launch(kernels.forward, inputs, (inputs[2], sums_BNT), tile, interpret)


def _query_bounds(start_BT, tile):
    return documents.query_block_bounds(start_BT, documents.Tile(ROWS, tile.streamed))


def _launch(kernel, inputs, outputs, tile, interpret):
    """Runs a kernel: inputs are bounds, edges of documents, q, ...; outputs: arrays like them."""
    batch, length, num_heads, head_size = outputs[0].shape
    dtype = outputs[0].dtype

    def matrix(*rows):
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM((*rows, head_size), dtype, transforms=transforms)

    own, streamed = (CONSUMERS, ROWS), (tile.stages, tile.streamed)
    own_arrays, stream = (matrix(*own), matrix(*own)), (matrix(*streamed),)
    if kernel is kernels.forward:
        own_arrays = (matrix(*own), plgpu.SMEM(own, jnp.float32))
    if kernel is kernels.key_gradients:
        stream += (plgpu.SMEM(streamed, jnp.float32),)
    ring = (
        stream,
        plgpu.Barrier(num_arrivals=len(stream), num_barriers=tile.stages),
        plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tile.stages),
    )
    copies = 1 if kernel is kernels.forward else 2
    ready = plgpu.Barrier(num_arrivals=copies, num_barriers=CONSUMERS)
    scratch = {"own": own_arrays, "ready": ready, "first": ring, "second": ring}
    if tile.turns:
        scratch["turns"] = plgpu.Barrier(num_barriers=CONSUMERS)
    options = {"interpret": plgpu.InterpretGPUParams()} if interpret else {}
    return plgpu.kernel(
        kernel,
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs),
        grid=(length // _BLOCK, num_heads, batch),
        grid_names=("block", "head", "row"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name=f"attention_{kernel.__name__}",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=512,  # sums of rows need none
        ),
        **options,
    )(*inputs)
