"""The model's forward pass over a prompt, and over one new token a row: `model/`'s own modules.

The layers are unrolled: a loop over them would copy each layer's weights and cache out of their
stacks for every token.

B rows, T tokens of the longest prompt, D width, V vocabulary, S slots, N query heads, K key/value
heads, H head size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from stablelm_jax.generation import cache as cache_lib
from stablelm_jax.generation.cache import LayerCache
from stablelm_jax.kernels.attention import attention
from stablelm_jax.kernels.device import traced_device
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.rotary import rotary_angles
from stablelm_jax.model.transformer import head_logits, part

# Rows of a step on a GPU at least: a product with one row is compiled as an elementwise product
# that goes to memory and a sum, a norm of one row as three kernels.
GPU_ROWS = 8


def read_prompts(
    model: ModelConfig,
    weights: Any,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    *,
    slots: int,
    dtype: jnp.dtype,
) -> tuple[jax.Array, list[LayerCache]]:
    """Logits after each prompt's last token, float32 [B, V], and the cache of all layers.

    Args:
      weights: of `decode_weights`.
      tokens_BT: prompts, padded behind. length_B: tokens of each.
    """
    position_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    position_BT = jnp.broadcast_to(position_T, tokens_BT.shape)
    segment_BT = (position_BT < length_B[:, None]).astype(jnp.int32)
    rotary = rotary_angles(position_BT, model.rotary_size, model.rotary_theta)
    cache: list[LayerCache] = []

    def attend(q_BTNH, k_BTKH, v_BTKH):
        cache.append(tuple(cache_lib.filled(x_BTKH, slots) for x_BTKH in (k_BTKH, v_BTKH)))
        return attention(q_BTNH, k_BTKH, v_BTKH, segment_BT)

    x_BTD = part(model, "embed", weights["embed"])(tokens_BT, dtype)
    for layer in weights["layers"]:
        x_BTD = part(model, "layers", layer)(x_BTD, rotary, attend)
    x_B1D = jnp.take_along_axis(x_BTD, length_B[:, None, None] - 1, axis=1)
    return _logits(model, weights, x_B1D), cache


def read_token(
    model: ModelConfig,
    weights: Any,
    cache: list[LayerCache],
    token_B: jax.Array,
    position_B: jax.Array,
    slot: jax.Array,
    visible_BS: jax.Array,
    *,
    dtype: jnp.dtype,
) -> tuple[jax.Array, list[LayerCache]]:
    """Logits after one more token a row, float32 [B, V], and the cache with that token in `slot`.

    Args:
      position_B: of the token in its row. visible_BS: slots it attends to, its own among them.
    """
    rows = token_B.shape[0]
    more = max(0, GPU_ROWS - rows) if traced_device().platform in ("gpu", "cuda") else 0
    token_B, position_B = (jnp.pad(x, (0, more)) for x in (token_B, position_B))
    rotary = rotary_angles(position_B[:, None], model.rotary_size, model.rotary_theta)
    written: list[LayerCache] = []

    def attend(q_B1NH, k_B1KH, v_B1KH):
        pairs = zip(cache[len(written)], (k_B1KH, v_B1KH))
        written.append(tuple(cache_lib.written(old, new[:rows], slot) for old, new in pairs))
        o_B1NH = cache_lib.attend(q_B1NH[:rows], *written[-1], visible_BS)
        if rows == 1:  # a copy of the row is read as it is needed, zeros would be written first
            return jnp.broadcast_to(o_B1NH, (1 + more, *o_B1NH.shape[1:]))
        return jnp.pad(o_B1NH, ((0, more), (0, 0), (0, 0), (0, 0)))

    x_B1D = part(model, "embed", weights["embed"])(token_B[:, None], dtype)
    for layer in weights["layers"]:
        x_B1D = part(model, "layers", layer)(x_B1D, rotary, attend)
    return _logits(model, weights, x_B1D)[:rows], written


def _logits(model, weights, x_B1D):
    x_B1D = part(model, "final_norm", weights["final_norm"])(x_B1D)
    return head_logits(weights, x_B1D[:, 0])
