"""Reads a GGUF file of architecture `stablelm` back: its model and its parameters."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np

from stablelm_jax.interop.gguf_tensors import Stored, stored_tensors
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import nest, specs_by_name

# Our field: the key after "stablelm.".
_KEYS = {
    "vocab_size": "vocab_size",
    "num_layers": "block_count",
    "width": "embedding_length",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "feed_forward_width": "feed_forward_length",
    "rotary_theta": "rope.freq_base",
    "norm_epsilon": "attention.layer_norm_epsilon",
    "parallel_residual": "use_parallel_residual",
}


def read_file(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model, biases in all its norms, and its float32 parameters.

    Raises:
      ValueError: no GGUF file, or a key or a tensor is missing, unknown or misshapen.
    """
    reader = gguf.GGUFReader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    model = _model(reader, stored.keys())
    expected = stored_tensors(model, "f32")
    wrong = {one.name for one in expected} ^ stored.keys()
    if wrong:
        raise ValueError(f"{path}: missing or unknown tensors: {', '.join(sorted(wrong)[:5])}")
    params = {}
    for ours, parts in itertools.groupby(expected, lambda one: one.tensor.ours):
        leaf = _leaf(specs_by_name(model)[ours].shape, ((p, stored[p.name]) for p in parts))
        params[ours] = jnp.asarray(leaf)
    return model, nest(params)


def _model(reader: gguf.GGUFReader, tensors: Iterable[str]) -> ModelConfig:
    values = {ours: _value(reader, f"stablelm.{key}") for ours, key in _KEYS.items()}
    head_size = values["width"] // values["num_heads"]
    return ModelConfig(
        **values,
        rotary_fraction=_value(reader, "stablelm.rope.dimension_count") / head_size,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        block_norm_bias=True,
        final_norm_bias=True,
    )


def _value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"the GGUF file lacks {key}")
    value = field.contents()
    # 1e-5 in float32 is another number in float64; the shortest one that it rounds from was meant.
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _leaf(shape: tuple[int, ...], parts: Iterable[tuple[Stored, gguf.ReaderTensor]]) -> np.ndarray:
    """One of our parameters, float32, from the tensors of the file that hold it."""
    leaf = np.empty(shape, np.float32)
    for stored, found in parts:
        tensor = stored.tensor
        values = gguf.quants.dequantize(found.data, found.tensor_type)
        if values.shape != tensor.shape:
            raise ValueError(f"{stored.name} is {values.shape}, not {tensor.shape}")
        leaf[tensor.index] = tensor.part_of_ours(values, leaf[tensor.index].shape)
    return leaf
