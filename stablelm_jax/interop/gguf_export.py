"""`convert to-gguf`: a checkpoint of ours as one file that llama.cpp runs.

What llama.cpp wants: its src/models/stablelm.cpp and conversion/stablelm.py; the names come from
the table in PyPI `gguf`. Rotary turns dims half a span apart there too, so no row is permuted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quantization
from gguf import GGUFValueType

from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.interop import gguf_types
from stablelm_jax.interop.gguf_tokens import add_tokenizer
from stablelm_jax.interop.tensor_map import Tensor, tensor_values, tensors
from stablelm_jax.interop.verify import Mismatch
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import count_parameters, specs_by_name


class Stored(NamedTuple):
    """One tensor of the file."""

    name: str
    tensor: Tensor  # which part of ours it holds, in which layout
    quantization: Quantization
    wished: Quantization | None = None  # where its rows are no whole number of that one's blocks

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[self.quantization]
        return math.prod(self.tensor.shape) // block_values * block_bytes


@functools.cache
def stored_tensors(
    model: ModelConfig, file_type: str, weighted: bool = False
) -> tuple[Stored, ...]:
    """Every tensor of the file in its order, which is that of our table of parameters.

    llama.cpp wants biases in all norms: those that the model lacks are there as zeros. `weighted`:
    whether there is an importance matrix.
    """
    file_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.STABLELM, model.num_layers)
    stored = []
    for tensor in tensors(model):
        if len(tensor.index) == 2:  # the norms of a layer's heads are one tensor here
            layer, head = tensor.index
            if head > 0:
                continue
            shape, name = specs_by_name(model)[tensor.ours].shape[1:], tensor.name
            name = name.replace(".norms.0", "")
            tensor = dataclasses.replace(tensor, name=name, shape=shape, index=(layer,))
        name = file_names.get_name(tensor.name, (".weight", ".bias"))
        if len(tensor.shape) < 2 or "norm" in tensor.ours:
            stored.append(Stored(name, tensor, Quantization.F32))
            continue
        wished = gguf_types.wished_type(model, file_type, name, weighted)
        found = gguf_types.fitting_type(wished, tensor.shape[-1])
        stored.append(Stored(name, tensor, found, None if found == wished else wished))
    return tuple(stored)


def write_file(
    checkpoint: SavedModel,
    path: Path,
    file_type: str,
    on_parameters: Callable[[int], None] = lambda count: None,
    importance: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> None:
    """Writes the GGUF file `path`. The host holds one of our parameters at a time.

    Args:
      file_type: one of gguf_types.FILE_TYPES.
      on_parameters: called with how many were written.
      importance: the mean square of each input of a matrix, by the matrix' name in the file.

    Raises:
      ValueError: the checkpoint is damaged, llama.cpp could not run its tokenizer or is not there
        to round to this type, or a value is not finite or too large for it.
    """
    stored = stored_tensors(checkpoint.model, file_type, bool(importance))
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.STABLELM])
    try:
        _add_metadata(writer, checkpoint, file_type)
        if importance:
            writer.add_uint32("quantize.imatrix.entries_count", len(importance))
        add_tokenizer(writer, checkpoint)
        for one in stored:
            writer.add_tensor_info(
                one.name,
                one.tensor.shape,
                np.dtype(np.float32),
                one.num_bytes,
                one.quantization,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        found = tensor_values([one.tensor for one in stored], checkpoint.leaves())
        for one, values in zip(stored, found):
            writer.write_tensor_data(_rounded(one, values, importance))
            on_parameters(0 if one.tensor.absent else values.size)
    finally:
        writer.close()


def _hyperparameters(checkpoint: SavedModel) -> dict[str, tuple[Any, GGUFValueType]]:
    """Key behind the name of the architecture: value and its type in the file."""
    model, count = checkpoint.model, GGUFValueType.UINT32
    return {
        "vocab_size": (model.vocab_size, count),
        "context_length": (checkpoint.max_positions, count),
        "embedding_length": (model.width, count),
        "block_count": (model.num_layers, count),
        "feed_forward_length": (model.feed_forward_width, count),
        "attention.head_count": (model.num_heads, count),
        "attention.head_count_kv": (model.num_kv_heads, count),
        "rope.dimension_count": (model.rotary_size, count),
        "rope.freq_base": (model.rotary_theta, GGUFValueType.FLOAT32),
        "attention.layer_norm_epsilon": (model.norm_epsilon, GGUFValueType.FLOAT32),
        "use_parallel_residual": (model.parallel_residual, GGUFValueType.BOOL),
    }


def _add_metadata(writer: gguf.GGUFWriter, checkpoint: SavedModel, file_type: str) -> None:
    run = checkpoint.run
    origin = run["config"]["name"] if "config" in run else run["imported"]["from"]
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"{origin} {checkpoint.name}")
    writer.add_size_label(gguf.size_label(count_parameters(checkpoint.model), 0, 0, 0))
    kind = "ALL" if file_type == "f32" else "MOSTLY"
    writer.add_file_type(gguf.LlamaFileType[f"{kind}_{file_type.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, (value, kind) in _hyperparameters(checkpoint).items():
        writer.add_key_value(f"{writer.arch}.{key}", value, kind)


def _rounded(
    stored: Stored, values: np.ndarray, importance: Mapping[str, np.ndarray]
) -> np.ndarray:
    try:
        return gguf_types.rounded(values, stored.quantization, importance.get(stored.name))
    except ValueError as error:
        raise ValueError(f"{stored.name} {error}") from None


def check_file(
    checkpoint: SavedModel,
    path: Path,
    file_type: str,
    importance: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> None:
    """Has `gguf` read every hyperparameter and every tensor back; compares with the checkpoint.

    Raises:
      Mismatch: one differs, a tensor by more than its type explains.
    """
    reader = gguf.GGUFReader(path)
    wrong = "was not written as it should be; try again"
    for key, (value, kind) in _hyperparameters(checkpoint).items():
        field = reader.get_field(f"stablelm.{key}")
        value = np.float32(value) if kind == GGUFValueType.FLOAT32 else value
        if field is None or field.contents() != value:
            raise Mismatch(f"stablelm.{key} {wrong}")
    written = {tensor.name: tensor.data for tensor in reader.tensors}
    stored = stored_tensors(checkpoint.model, file_type, bool(importance))
    meant = tensor_values([one.tensor for one in stored], checkpoint.leaves())
    for one, values in zip(stored, meant):
        weights = importance.get(one.name)
        if not gguf_types.explains(one.quantization, written[one.name], values, weights):
            raise Mismatch(f"{one.name} {wrong}")
