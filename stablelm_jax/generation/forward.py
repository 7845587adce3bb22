"""The forward pass of decoding: the weights it reads, the cache, a prompt, one more token.

It runs `model/`'s own modules. The layers are unrolled: a loop over them would copy each layer's
weights and cache out of their stacks for every token.

All rows of a batch write to the same slot of the cache: a prompt lies in slots 0 .. its length, new
tokens lie in the slots from the longest prompt's padded end on, and a mask leaves out what is
between. Rotary has turned the keys by then, so a token's slot need not be its position. One slot
for all rows is a slice; a slot for each row would be a scatter.

B rows, T tokens of the longest prompt, D width, V vocabulary, S slots, N query heads, K key/value
heads, G = N / K query heads for each key head, H head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from stablelm_jax.kernels.attention import attention
from stablelm_jax.kernels.device import traced_device
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import parameter_table
from stablelm_jax.model.rotary import rotary_angles
from stablelm_jax.model.transformer import head_logits, part
from stablelm_jax.parallel import sharding

# Keys and values of one layer, each [B, K, S, H]: the slots next to the head's dims, so that
# scores, softmax and the sum over values are two kernels on a GPU; with [B, S, K, H] they are six.
LayerCache = tuple[jax.Array, jax.Array]

# A step on a GPU has this many rows at least: a product with one row is compiled as an elementwise
# product that goes to memory and a sum, a norm of one row as three kernels.
GPU_ROWS = 8


def decode_weights(
    model: ModelConfig, mesh: Mesh, dtype: jnp.dtype
) -> tuple[Callable[[Any], Any], Any]:
    """Jitted f(params) -> weights, and their shardings.

    The weights are the parameters in `dtype`, with a list of trees, one a layer, in the place of
    the stacked layers; they are split over `model` of the mesh alone.

    Raises:
      ValueError: key heads that `model` of the mesh does not divide.
    """
    check_split(model.num_kv_heads, mesh.shape["model"])
    specs = sharding.parameter_specs(parameter_table(model))
    one_layer = jax.tree.map(
        lambda spec: PartitionSpec(*spec[1:]),
        specs["layers"],
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    numbers = range(model.num_layers)
    places = sharding.named(mesh, specs | {"layers": [one_layer for _ in numbers]})

    def copy(params):
        layers = [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in numbers]
        return sharding.gathered(params | {"layers": layers}, dtype, places)

    return jax.jit(copy, out_shardings=places), places


def check_split(num_kv_heads: int, devices: int) -> None:
    """Raises ValueError where so many devices cannot each have whole key heads."""
    if num_kv_heads % devices:
        raise ValueError(
            f"{num_kv_heads} key heads cannot be split over {devices} devices: "
            "let as many share the model as divide them"
        )


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

    The prompts are padded behind to T; length_B is the number of tokens of each.
    """
    position_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    position_BT = jnp.broadcast_to(position_T, tokens_BT.shape)
    segment_BT = (position_BT < length_B[:, None]).astype(jnp.int32)
    cache: list[LayerCache] = []

    def cached(x_BTKH):
        x_BKTH = jnp.swapaxes(x_BTKH, 1, 2)
        return jnp.pad(x_BKTH, ((0, 0), (0, 0), (0, slots - x_BKTH.shape[2]), (0, 0)))

    def attend(q_BTNH, k_BTKH, v_BTKH):
        cache.append((cached(k_BTKH), cached(v_BTKH)))
        return attention(q_BTNH, k_BTKH, v_BTKH, segment_BT)

    x_BTD = _blocks(model, weights, tokens_BT, position_BT, attend, dtype)
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
      position_B: where the token stands in its row.
      visible_BS: the slots it attends to, its own among them.
    """
    rows = token_B.shape[0]
    more = max(0, GPU_ROWS - rows) if traced_device().platform in ("gpu", "cuda") else 0
    token_B, position_B = (jnp.pad(x, (0, more)) for x in (token_B, position_B))
    written: list[LayerCache] = []

    def cached(cache_BKSH, x_B1KH):
        x_BK1H = jnp.swapaxes(x_B1KH[:rows], 1, 2)
        return jax.lax.dynamic_update_slice(cache_BKSH, x_BK1H, (0, 0, slot, 0))

    def attend(q_B1NH, k_B1KH, v_B1KH):
        k_BKSH, v_BKSH = cache[len(written)]
        written.append((cached(k_BKSH, k_B1KH), cached(v_BKSH, v_B1KH)))
        o_B1NH = _attend(q_B1NH[:rows], *written[-1], visible_BS)
        if rows == 1:  # a copy of the row is read as it is needed, zeros would be written first
            return jnp.broadcast_to(o_B1NH, (1 + more, *o_B1NH.shape[1:]))
        return jnp.pad(o_B1NH, ((0, more), (0, 0), (0, 0), (0, 0)))

    x_B1D = _blocks(model, weights, token_B[:, None], position_B[:, None], attend, dtype)
    return _logits(model, weights, x_B1D)[:rows], written


def _blocks(model, weights, tokens_BT, position_BT, attend, dtype):
    """The embedding and all layers: x_BTD before the final norm."""
    rotary = rotary_angles(position_BT, model.rotary_size, model.rotary_theta)
    x_BTD = part(model, "embed", weights["embed"])(tokens_BT, dtype)
    for layer in weights["layers"]:
        x_BTD = part(model, "layers", layer)(x_BTD, rotary, attend)
    return x_BTD


def _logits(model, weights, x_B1D):
    x_B1D = part(model, "final_norm", weights["final_norm"])(x_B1D)
    return head_logits(weights, x_B1D[:, 0])


@jax.named_scope("attention_kernel")
def _attend(q_B1NH, k_BKSH, v_BKSH, visible_BS):
    """softmax(q k / sqrt(H)) v over the visible slots, [B, 1, N, H]; scores and softmax float32."""
    batch, _, num_heads, head_size = q_B1NH.shape
    q_BKGH = q_B1NH.reshape(batch, k_BKSH.shape[1], -1, head_size)
    scores_BKGS = jnp.einsum(
        "bkgh,bksh->bkgs", q_BKGH, k_BKSH, preferred_element_type=jnp.float32
    ) / math.sqrt(head_size)
    scores_BKGS = jnp.where(visible_BS[:, None, None], scores_BKGS, -jnp.inf)
    weights_BKGS = jax.nn.softmax(scores_BKGS, axis=-1).astype(v_BKSH.dtype)
    return jnp.einsum("bkgs,bksh->bkgh", weights_BKGS, v_BKSH).reshape(q_B1NH.shape)
