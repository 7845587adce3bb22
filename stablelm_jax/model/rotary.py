"""Rotary position embedding on the first dims of every head (Su et al. 2021, arXiv 2104.09864).

B batch, T sequence, N heads, H head size, R half of the rotary dims.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.named_scope("rotary")
def rotary_angles(positions_BT: jax.Array, size: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angles, float32 [B, T, size / 2].

    The frequencies theta ** (-2i / size) count the `size` rotary dims alone, not the head.
    """
    frequencies_R = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles_BTR = positions_BT.astype(jnp.float32)[..., None] * frequencies_R
    return jnp.cos(angles_BTR), jnp.sin(angles_BTR)


@jax.named_scope("rotary")
def rotate(x_BTNH: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array) -> jax.Array:
    """Turns dims (j, j + R) for j < R (the half-split form of GPT-NeoX); the rest pass unchanged.

    Computed in float32, returned in the dtype of x.
    """
    half = cos_BTR.shape[-1]
    cos_BT1R, sin_BT1R = cos_BTR[:, :, None], sin_BTR[:, :, None]
    first, second = (x_BTNH[..., i * half : (i + 1) * half].astype(jnp.float32) for i in (0, 1))
    turned = (first * cos_BT1R - second * sin_BT1R, second * cos_BT1R + first * sin_BT1R)
    return jnp.concatenate([*(t.astype(x_BTNH.dtype) for t in turned), x_BTNH[..., 2 * half :]], -1)
