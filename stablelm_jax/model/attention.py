"""The attention sub-layer: projections, per-head norms, rotary; the kernel itself is passed in.

B batch, T sequence, D width, N query heads, K key/value heads, H head size, R half the rotary dims.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx

from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.layers import LayerNorm, Make, Projection
from stablelm_jax.model.parameters import specs_by_name
from stablelm_jax.model.rotary import rotate

# (q_BTNH, k_BTKH, v_BTKH) -> o_BTNH
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, make: Make):
        name = "layers/attention"
        self.query = Projection(make, f"{name}/query")
        self.key = Projection(make, f"{name}/key")
        self.value = Projection(make, f"{name}/value")
        out = specs_by_name(config)[f"{name}/out/kernel"]
        self.out = Projection(make, f"{name}/out", out.num_input_dims)
        if config.qk_norm:
            self.query_norm = LayerNorm(make, f"{name}/query_norm", config.norm_epsilon)
            self.key_norm = LayerNorm(make, f"{name}/key_norm", config.norm_epsilon)
        self.qk_norm = config.qk_norm

    @jax.named_scope("attention")
    def __call__(
        self, x_BTD: jax.Array, rotary: tuple[jax.Array, jax.Array], attend: Attend
    ) -> jax.Array:
        """`rotary` holds the cosines and sines of `rotary_angles`; `attend` mixes the tokens."""
        q_BTNH, k_BTKH, v_BTKH = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.qk_norm:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        q_BTNH, k_BTKH = rotate(q_BTNH, *rotary), rotate(k_BTKH, *rotary)
        return self.out(attend(q_BTNH, k_BTKH, v_BTKH))
