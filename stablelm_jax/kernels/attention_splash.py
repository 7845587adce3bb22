"""jax's splash attention for TPUs, given our documents: where `attention_tpu` does not fit.

B batch, T queries and keys, N query heads, K key/value heads, H head size.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha_single_device,
)

from stablelm_jax.kernels.residuals import SAVED_NAMES

# The kernel cuts rows into blocks of whole lanes of the vector unit.
LANES = 128
# The most queries or keys of a block, for heads that fit in one span of lanes; larger heads take
# half: 1024 with heads of 160 do not fit in a v4's vector memory. 1024 needs twelve percent fewer
# bundles than 512 for v4 (benchmarks/tpu_bundles.py).
BLOCK = 1024


def splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v over earlier tokens of the same segment id, in the dtype of q.

    Any H goes in as it is: the kernel's blocks span the whole head, which the compiler lays out in
    128 lanes. Rows are filled up to whole blocks with a segment of their own. Blocks of keys after
    the queries are skipped; other documents are only masked, so a row of many documents costs as
    much as a single document of that length. Products of float32 run in the TPU's default
    precision, bfloat16, unless `jax.default_matmul_precision` says more. `interpret` runs it
    anywhere, slowly, for tests.
    """
    length, num_heads, size = q_BTNH.shape[1:]
    block = _block(length, size)
    padding = (0, -length % block)
    # The kernel knows no scale. At head sizes 64 and 256 this rounds nothing.
    q_BTNH = (q_BTNH.astype(jnp.float32) * (1 / math.sqrt(size))).astype(q_BTNH.dtype)
    q_BNTH, k_BKTH, v_BKTH = (
        jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), padding, (0, 0)))
        for x in (q_BTNH, k_BTKH, v_BTKH)
    )
    ids_BT = jnp.pad(segment_ids_BT, ((0, 0), padding), constant_values=-1)
    # Backward in two kernels, for dq and for dk and dv. The fused one would compute the scores once
    # instead of twice, but it writes dq once for every block of keys, rounded to the dtype of q,
    # and sums that: T / block times the memory of q.
    kernel = make_splash_mha_single_device(
        MultiHeadMask([CausalMask((q_BNTH.shape[2],) * 2)] * num_heads),
        block_sizes=BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        residual_checkpoint_name=SAVED_NAMES[0],  # of result and log-sum-exp
        interpret=interpret,
    )
    attend = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, SegmentIds(ids, ids)))
    return jnp.swapaxes(attend(q_BNTH, k_BKTH, v_BKTH, ids_BT), 1, 2)[:, :length]


def _block(length: int, size: int) -> int:
    """Whole lanes, at most BLOCK, so that as few blocks as possible hold the row tightly."""
    most = BLOCK if size <= LANES else BLOCK // 2
    tiles = -(-length // LANES)
    count = -(-tiles * LANES // most)
    return LANES * -(-tiles // count)
