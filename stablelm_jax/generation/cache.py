"""The cache of keys and values, and attention of one new token over it.

All rows of a batch write to the same slot: a prompt lies in slots 0 .. its length, new tokens in
the slots from the longest prompt's padded end on, and a mask leaves out what lies between. Rotary
has turned the keys by then, so a token's slot need not be its position; and one slot for all rows
is a slice, where a slot for each row would be a scatter.

B rows, T tokens of a prompt, S slots, N query heads, K key/value heads, G = N / K query heads for
each key head, H head size.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# Keys and values of one layer, each [B, K, S, H]: the slots next to the head's dims, so that
# scores, softmax and the sum over values are two kernels on a GPU; with [B, S, K, H] they are six.
LayerCache = tuple[jax.Array, jax.Array]


def filled(x_BTKH: jax.Array, slots: int) -> jax.Array:
    """Keys or values of a prompt as [B, K, S, H], zero in the slots behind it."""
    x_BKTH = jnp.swapaxes(x_BTKH, 1, 2)
    return jnp.pad(x_BKTH, ((0, 0), (0, 0), (0, slots - x_BKTH.shape[2]), (0, 0)))


def written(cache_BKSH: jax.Array, x_B1KH: jax.Array, slot: jax.Array) -> jax.Array:
    """The cache with the keys or values of one token in `slot`."""
    return jax.lax.dynamic_update_slice(cache_BKSH, jnp.swapaxes(x_B1KH, 1, 2), (0, 0, slot, 0))


def visible_slots(length_B: jax.Array, start: jax.Array, slot: jax.Array, slots: int) -> jax.Array:
    """Which slots hold a token of the row: bool [B, S].

    Args:
      length_B: tokens of each row's prompt. start, slot: first and last slot of new tokens.
    """
    index_S = jnp.arange(slots)
    return (index_S < length_B[:, None]) | ((index_S >= start) & (index_S <= slot))


@jax.named_scope("attention_kernel")
def attend(
    q_B1NH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, visible_BS: jax.Array
) -> jax.Array:
    """softmax(q k / sqrt(H)) v over the visible slots, [B, 1, N, H]; scores and softmax float32."""
    batch, _, num_heads, head_size = q_B1NH.shape
    q_BKGH = q_B1NH.reshape(batch, k_BKSH.shape[1], -1, head_size)
    scores_BKGS = jnp.einsum(
        "bkgh,bksh->bkgs", q_BKGH, k_BKSH, preferred_element_type=jnp.float32
    ) / math.sqrt(head_size)
    scores_BKGS = jnp.where(visible_BS[:, None, None], scores_BKGS, -jnp.inf)
    weights_BKGS = jax.nn.softmax(scores_BKGS, axis=-1).astype(v_BKSH.dtype)
    return jnp.einsum("bkgs,bksh->bkgh", weights_BKGS, v_BKSH).reshape(q_B1NH.shape)
