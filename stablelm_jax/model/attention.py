"""The attention sub-layer: projections, per-head norms, rotary; the kernel itself is passed in.

B batch, T sequence, D width, N query heads, K key/value heads, H head size, R half the rotary dims.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.layers import Make, Norm, Projection
from stablelm_jax.model.parameters import specs_by_name

# (q_BTNH, k_BTKH, v_BTKH) -> o_BTNH: what mixes the tokens
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Rotary = tuple[jax.Array, jax.Array]  # cosine and sine of the angles, float32 [B, T, R]


@jax.named_scope("rotary")
def rotary_angles(positions_BT: jax.Array, size: int, theta: float) -> Rotary:
    """The rotary position embedding of Su et al. 2021, arXiv 2104.09864.

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


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, make: Make):
        name = "layers/attention"
        self.query = Projection(make, f"{name}/query")
        self.key = Projection(make, f"{name}/key")
        self.value = Projection(make, f"{name}/value")
        out = specs_by_name(config)[f"{name}/out/kernel"]
        self.out = Projection(make, f"{name}/out", out.num_input_dims)
        if config.qk_norm:
            self.query_norm = Norm(make, f"{name}/query_norm", config)
            self.key_norm = Norm(make, f"{name}/key_norm", config)
        self.qk_norm = config.qk_norm

    @jax.named_scope("attention")
    def __call__(self, normed: Sequence[jax.Array], rotary: Rotary, attend: Attend) -> jax.Array:
        """`normed`: x_BTD for query, key and value, each with its own gradient."""
        projections = (self.query, self.key, self.value)
        q_BTNH, k_BTKH, v_BTKH = (p(x_BTD) for p, x_BTD in zip(projections, normed, strict=True))
        if self.qk_norm:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        q_BTNH, k_BTKH = rotate(q_BTNH, *rotary), rotate(k_BTKH, *rotary)
        return self.out(attend(q_BTNH, k_BTKH, v_BTKH))
