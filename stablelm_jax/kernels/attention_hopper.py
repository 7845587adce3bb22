"""Other people's attention kernels for Hopper, given our documents: cuDNN's and tokamax's.

Both are reached through names that their packages keep private, because only there documents can
be said without a T x T mask. Neither is chosen by itself, and neither has run yet: no Hopper was at
hand.

B batch, T queries and keys, N query heads, K key/value heads, H head size, M most documents of a
row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stablelm_jax.kernels import attention_gpu
from stablelm_jax.kernels.documents import document_spans

# cuDNN keeps B M N T float32 for its backward pass, so M is small.
MOST_DOCUMENTS = 64


def cudnn(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """cuDNN's fused attention with documents packed in rows; bfloat16 or float16, Hopper or newer.

    A batch in which a row has more than MOST_DOCUMENTS takes `attention_gpu.pallas_gpu` instead,
    decided on the device. Nothing of it is saved by name: every remat but 'none' runs the forward
    kernel twice.

    Raises:
      NotImplementedError: by jax, for a head size, dtype or chip that cuDNN cannot do.
      RuntimeError: by jax, where cuDNN is not installed.
    """
    most = min(MOST_DOCUMENTS, q_BTNH.shape[1])
    lengths_BM, offsets_BM, fits = packed_documents(segment_ids_BT, most)

    def fused(q_BTNH, k_BTKH, v_BTKH):
        from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

        # jax 0.10 counts the offsets of keys in heads of queries: with fewer of them it is wrong.
        group = q_BTNH.shape[2] // k_BTKH.shape[2]
        k_BTKH, v_BTKH = (jnp.repeat(x, group, axis=2) for x in (k_BTKH, v_BTKH))
        return dot_product_attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            q_seqlen=lengths_BM,
            kv_seqlen=lengths_BM,
            q_offsets=offsets_BM,
            kv_offsets=offsets_BM,
            scale=q_BTNH.shape[-1] ** -0.5,
            mask_type=MaskType.PADDING_CAUSAL,
        )

    def ours(q_BTNH, k_BTKH, v_BTKH):
        return attention_gpu.pallas_gpu(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)

    return jax.lax.cond(fits, fused, ours, q_BTNH, k_BTKH, v_BTKH)


def packed_documents(
    segment_ids_BT: jax.Array, most: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lengths [B, M] and first tokens [B, M + 1] of each row's documents, -1 where there is none.

    The third says whether no row has more than `most`; if one has, the other two are useless.
    """
    start_BT, end_BT = document_spans(segment_ids_BT)
    positions = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    is_first_BT = start_BT == positions
    index_BT = jnp.cumsum(is_first_BT, axis=1) - 1
    # Every other token's numbers are written past the end, where they are dropped.
    place_BT = jnp.where(is_first_BT, index_BT, most + 1)
    rows_B1 = jnp.arange(segment_ids_BT.shape[0])[:, None]
    empty = jnp.full((segment_ids_BT.shape[0], most + 1), -1, jnp.int32)
    offsets = empty.at[rows_B1, place_BT].set(start_BT, mode="drop")
    lengths = empty.at[rows_B1, place_BT].set(end_BT - start_BT, mode="drop")[:, :most]
    return lengths, offsets, jnp.max(index_BT) < most


def tokamax(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """tokamax's Mosaic kernels, which skip keys before a document's start.

    Nothing of it is saved by name: every remat but 'none' runs the forward kernel twice.

    Raises:
      ImportError: tokamax is not installed, or its version has no such kernel.
      NotImplementedError: by tokamax, for what it cannot do (backward on A100, for one).
    """
    try:
        from tokamax._src.ops.attention import api, base

        attend = api.IMPLEMENTATIONS["mosaic_gpu"]
    except (ImportError, KeyError) as error:
        raise ImportError(
            f"config.training.attention='tokamax' needs tokamax with its Mosaic kernels ({error}): "
            "pip install tokamax, or choose another attention"
        ) from error
    start_BT, _ = document_spans(segment_ids_BT)
    mask = base.Mask(k_start=start_BT[:, None, :], is_causal=True)
    return attend(q_BTNH, k_BTKH, v_BTKH, mask=mask)
