"""The table of every parameter: name, shape, first value, decay, axes. Nothing else says these.

The NNX modules ask `initial_value` for each tensor they own, so a parameter that is not in the
table does not exist in the model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from stablelm_jax.model.config import ModelConfig

# Logical axis names, translated to mesh axes by parallel/.
VOCAB, WIDTH, HEADS, KV_HEADS = "vocab", "width", "heads", "kv_heads"
HEAD_SIZE, FEED_FORWARD, LAYERS = "head_size", "feed_forward", "layers"
RANK = "rank"  # of adapters


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """One float32 tensor of the model; `axes` names each dim of `shape`."""

    name: str  # path in the nested dict of parameters, such as 'layers/mlp/gate/kernel'
    shape: tuple[int, ...]
    init_std: float | str  # standard deviation of a normal, or 'ones', or 'zeros'
    decay: bool  # does weight decay apply
    axes: tuple[str, ...]
    # behind the axis of layers, the dims that a matrix product sums over; 0: this is no matrix
    num_input_dims: int = 0

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def stacked(self) -> bool:
        """True when axis 0 runs over the layers."""
        return self.axes[0] == LAYERS

    @property
    def layer_matrix(self) -> tuple[int, int] | None:
        """(inputs, outputs) of a layer's kernel; None for all else, head and embedding too."""
        split = 1 + self.num_input_dims
        is_matrix = self.stacked and self.num_input_dims
        return (
            (math.prod(self.shape[1:split]), math.prod(self.shape[split:])) if is_matrix else None
        )


@functools.cache
def parameter_table(config: ModelConfig) -> tuple[ParameterSpec, ...]:
    """Every parameter of the model in the order of the forward pass.

    Decay as GPT-NeoX groups it (megatron/model/utils.py): all but norms and biases; embedding and
    head decay. First values as in the published config: normal of `init_std`, the two matrices
    that write to the residual stream `init_std / sqrt(2 * num_layers)` ("scaled normal").
    """
    sizes = {
        VOCAB: config.vocab_size,
        WIDTH: config.width,
        HEADS: config.num_heads,
        KV_HEADS: config.num_kv_heads,
        HEAD_SIZE: config.head_size,
        FEED_FORWARD: config.feed_forward_width,
        LAYERS: config.num_layers,
    }

    def spec(name, init_std, axes, num_input_dims=0):
        decay = not isinstance(init_std, str)
        shape = tuple(sizes[axis] for axis in axes)
        return ParameterSpec(name, shape, init_std, decay, axes, num_input_dims)

    head = spec("head/kernel", config.init_std, (WIDTH, VOCAB), 1)
    return (
        spec("embed/embedding", config.init_std, (VOCAB, WIDTH)),
        *_norm(spec, "layers/attention_norm", (LAYERS, WIDTH), config.block_norm_bias),
        *_attention(spec, config),
        *_mlp(spec, config),
        *_norm(spec, "final_norm", (WIDTH,), config.final_norm_bias),
        *(() if config.tie_embeddings else (head,)),
    )


def _norm(spec, name, axes, bias):
    yield spec(f"{name}/scale", "ones", axes)
    if bias:
        yield spec(f"{name}/bias", "zeros", axes)


def _attention(spec, config):
    name = "layers/attention"
    for part, heads in (("query", HEADS), ("key", KV_HEADS), ("value", KV_HEADS)):
        axes = (LAYERS, WIDTH, heads, HEAD_SIZE)
        yield spec(f"{name}/{part}/kernel", config.init_std, axes, 1)
        if config.qkv_bias:
            yield spec(f"{name}/{part}/bias", "zeros", (LAYERS, heads, HEAD_SIZE))
    if config.qk_norm:
        yield spec(f"{name}/query_norm/scale", "ones", (LAYERS, HEADS, HEAD_SIZE))
        yield spec(f"{name}/key_norm/scale", "ones", (LAYERS, KV_HEADS, HEAD_SIZE))
    axes = (LAYERS, HEADS, HEAD_SIZE, WIDTH)
    yield spec(f"{name}/out/kernel", _residual_std(config), axes, 2)


def _mlp(spec, config):
    if not config.parallel_residual:  # the parallel form shares the norm of attention
        yield from _norm(spec, "layers/mlp_norm", (LAYERS, WIDTH), config.block_norm_bias)
    for part in ("gate", "up"):
        yield spec(f"layers/mlp/{part}/kernel", config.init_std, (LAYERS, WIDTH, FEED_FORWARD), 1)
    yield spec("layers/mlp/down/kernel", _residual_std(config), (LAYERS, FEED_FORWARD, WIDTH), 1)


def _residual_std(config):
    return config.init_std / math.sqrt(2 * config.num_layers)


@functools.cache
def specs_by_name(config: ModelConfig) -> dict[str, ParameterSpec]:
    return {spec.name: spec for spec in parameter_table(config)}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{'a/b': x} as {'a': {'b': x}}: the tree that belongs to a table of names."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def flatten(tree: Any) -> dict[str, Any]:
    """The inverse of `nest`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def count_parameters(config: ModelConfig) -> int:
    return sum(spec.count for spec in parameter_table(config))


def initial_value(spec: ParameterSpec, key: jax.Array) -> jax.Array:
    """First value, float32; of one layer (no layer axis) where the parameter is stacked.

    The stream of random numbers is chosen by the parameter's name, so a tensor keeps its first
    value when others join the model.
    """
    shape = spec.shape[1:] if spec.stacked else spec.shape
    if spec.init_std == "ones":
        return jnp.ones(shape, jnp.float32)
    if spec.init_std == "zeros":
        return jnp.zeros(shape, jnp.float32)
    key = jax.random.fold_in(key, zlib.crc32(spec.name.encode()))
    return spec.init_std * jax.random.normal(key, shape, jnp.float32)


def format_parameter_table(table: tuple[ParameterSpec, ...]) -> str:
    """The table as plain text, one parameter a line, the total last."""
    rows = [("name", "shape", "count", "init", "decay", "axes")]
    for spec in table:
        init = spec.init_std if isinstance(spec.init_std, str) else f"{spec.init_std:.7g}"
        shape, decay = "x".join(map(str, spec.shape)), "yes" if spec.decay else "no"
        rows.append((spec.name, shape, f"{spec.count:,}", init, decay, " ".join(spec.axes)))
    rows.append(("total", "", f"{sum(spec.count for spec in table):,}", "", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows)]
    line = "  ".join(f"{{:{'>' if i == 2 else ''}{width}}}" for i, width in enumerate(widths))
    return "".join(line.format(*row).rstrip() + "\n" for row in rows)
