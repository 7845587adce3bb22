"""Flash attention inside documents for TPUs, in Pallas; `attention_tpu_kernels` has the kernels.

Tiles outside a document are never visited. Backward is one kernel: it computes the scores once and
keeps the sums of all three gradients of a head's row in the core's vector memory, which bounds the
length of a row.

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

from stablelm_jax.kernels import attention_tpu_kernels as kernels
from stablelm_jax.kernels import documents
from stablelm_jax.kernels.attention_tpu_kernels import LANES
from stablelm_jax.kernels.documents import Tile, document_spans
from stablelm_jax.kernels.residuals import named

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
        partial(kernels.forward, tile=tile),
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
        partial(kernels.backward, tile=tile),
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
