"""The decoder: embedding, a scanned stack of blocks, final norm, head.

`Transformer` is the NNX module; `init_params`, `hidden_states` and `logits` are the pure functions
the rest of the project uses, on a plain nested dict of parameters (names: parameters.py).

B batch, T sequence, D width, V vocabulary, N query heads, K key/value heads, H head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from stablelm_jax.kernels.attention import attention as attention_kernel
from stablelm_jax.kernels.residuals import SAVED_NAMES
from stablelm_jax.model.attention import Attend, Attention, Rotary, rotary_angles
from stablelm_jax.model.compute import Compute
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.layers import Make, Norm, Projection, product
from stablelm_jax.model.lora import PRODUCT
from stablelm_jax.model.parameters import initial_value, specs_by_name

Params = dict[str, Any]
# Called as fetch(group, parameters of the group) where a group is used; gives them whole.
Fetch = Callable[[str, Params], Params]

# What the backward pass finds saved from the forward pass; the rest it computes again.
_attention = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
_products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        _products, jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES, PRODUCT)
    ),
    "attention": _attention,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Mlp(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, make: Make):
        self.gate = Projection(make, "layers/mlp/gate")
        self.up = Projection(make, "layers/mlp/up")
        self.down = Projection(make, "layers/mlp/down")

    @jax.named_scope("mlp")
    def __call__(self, normed: Sequence[jax.Array]) -> jax.Array:
        """`normed`: x_BTD for gate and up, each with its own gradient."""
        to_gate_BTD, to_up_BTD = normed
        return self.down(jax.nn.silu(self.gate(to_gate_BTD)) * self.up(to_up_BTD))


class Block(nnx.Module):
    """One layer; the parallel form feeds attention and MLP from one norm and adds both at once."""

    def __init__(self, config: ModelConfig, make: Make):
        self.attention_norm = Norm(make, "layers/attention_norm", config)
        self.attention = Attention(config, make)
        if not config.parallel_residual:
            self.mlp_norm = Norm(make, "layers/mlp_norm", config)
        self.mlp = Mlp(make)
        self.parallel_residual = config.parallel_residual

    def __call__(
        self, x_BTD: jax.Array, rotary: Rotary, attend: Attend, norms: str = "xla"
    ) -> jax.Array:
        readers = 5 if self.parallel_residual else 3
        x_BTD, normed = self.attention_norm.branch(x_BTD, readers, norms)
        attended_BTD = self.attention(normed[:3], rotary, attend)
        if self.parallel_residual:
            # These two first: split over `model` they are partial sums, and need one sum, not two.
            return x_BTD + (attended_BTD + self.mlp(normed[3:]))
        x_BTD, normed = self.mlp_norm.branch(x_BTD + attended_BTD, 2, norms)
        return x_BTD + self.mlp(normed)


class Embedding(nnx.Module):
    def __init__(self, make: Make):
        self.embedding = make("embed/embedding")

    @jax.named_scope("embed")
    def __call__(self, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return self.embedding[...][tokens_BT].astype(dtype)


class Transformer(nnx.Module):
    """The whole model; `layers` is one Block whose parameters carry the layers on axis 0."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        def make(key, name):
            spec = specs_by_name(config).get(name)
            return None if spec is None else nnx.Param(initial_value(spec, key))

        def block(key):
            return Block(config, functools.partial(make, key))

        make_here = functools.partial(make, key)
        self.embed = Embedding(make_here)
        self.layers = nnx.vmap(block)(jax.random.split(key, config.num_layers))
        self.final_norm = Norm(make_here, "final_norm", config)
        if not config.tie_embeddings:
            self.head = Projection(make_here, "head")


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters as a plain nested dict; the same bits on any mesh."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, key)))


@functools.cache
def _graph(config: ModelConfig, part: str) -> nnx.GraphDef:
    model = nnx.eval_shape(lambda: Transformer(config, jax.random.key(0)))
    return nnx.split(getattr(model, part))[0]


def part(config: ModelConfig, name: str, params: Params) -> nnx.Module:
    """One module of the model with its parameters: 'embed', 'layers' (one Block), 'final_norm'."""
    return nnx.merge(_graph(config, name), params)


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array,
    compute: Compute = Compute(),
    fetch: Fetch | None = None,
    watch: Callable[[jax.Array], jax.Array] | None = None,
) -> Any:
    """What the head reads: x_BTD in `compute.dtype`, after the final norm.

    Args:
      tokens_BT: int32 ids below config.vocab_size (an id outside reads as its nearest valid row).
      segment_ids_BT: int32; a token attends to earlier tokens of the same id only.
      positions_BT: int32 position of each token in its document.
      fetch: makes the parameters of a group whole where it is used: 'embed', 'layers' (of one
        layer, without the axis of layers), 'final_norm'. But for remat 'none', backward fetches
        again.
      watch: gets x_BTD after each layer. What it gives is returned too: (x_BTD, [L, ...]).

    Raises:
      ValueError: for an unknown `compute.remat` or `compute.attention`.
    """
    if compute.remat not in REMAT_POLICIES:
        raise ValueError(f"remat is {compute.remat!r}: choose one of {', '.join(REMAT_POLICIES)}")
    rotary = rotary_angles(positions_BT, config.rotary_size, config.rotary_theta)

    def fetched(name, group):
        return part(config, name, group if fetch is None else fetch(name, group))

    def attend(*qkv):
        return attention_kernel(*qkv, segment_ids_BT, implementation=compute.attention)

    def layer(x_BTD, group):
        x_BTD = fetched("layers", group)(x_BTD, rotary, attend, compute.norms)
        return x_BTD, watch and watch(x_BTD)

    if compute.remat != "none":
        # Unrolled to the end there is no loop between the first time and the second, and compilers
        # would keep the first results instead of computing them again.
        prevent_cse = compute.unroll >= config.num_layers
        policy = REMAT_POLICIES[compute.remat]
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=prevent_cse)
    x_BTD = fetched("embed", params["embed"])(tokens_BT, compute.dtype)
    x_BTD, watched = jax.lax.scan(layer, x_BTD, params["layers"], unroll=compute.unroll)
    x_BTD = fetched("final_norm", params["final_norm"])(x_BTD)
    return x_BTD if watch is None else (x_BTD, watched)


def logits(config: ModelConfig, params: Params, *inputs: Any) -> jax.Array:
    """Scores of the next token, float32 [B, T, V]; `inputs` are those of `hidden_states`."""
    return head_logits(params, hidden_states(config, params, *inputs))


@jax.named_scope("head")
def head_logits(params: Params, x: jax.Array) -> jax.Array:
    """Scores of the next token, float32 [..., V], of what `hidden_states` gives, [..., D]."""
    return product(x, head_kernel(params), jnp.float32)


def head_kernel(params: Params, fetch: Fetch | None = None) -> jax.Array:
    """What the head multiplies by, [D, V]: its own matrix, or the embedding where they are tied.

    `fetch` is that of `hidden_states`.
    """
    name = "head" if "head" in params else "embed"
    group = params[name] if fetch is None else fetch(name, params[name])
    return group["kernel"] if name == "head" else group["embedding"].T
