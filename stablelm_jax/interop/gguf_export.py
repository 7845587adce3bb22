"""`convert to-gguf`: a checkpoint of ours as one file that llama.cpp runs.

What llama.cpp wants: its src/models/stablelm.cpp and conversion/stablelm.py; the names come from
the table in PyPI `gguf`. Rotary turns dims half a span apart there too, so no row is permuted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quantization
from gguf import GGUFValueType, LlamaFileType

from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.interop.gguf_tokens import add_tokenizer
from stablelm_jax.interop.tensor_map import Tensor, tensor_values, tensors
from stablelm_jax.interop.verify import Mismatch
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import count_parameters, specs_by_name


class FileType(NamedTuple):
    """What a file says of itself, and the types of its matrices and of its head.

    Norms and biases are float32 in every file. The head of a 4-bit file is finer, as llama.cpp's
    own quantiser has it: q6_K there, which PyPI `gguf` cannot write.
    """

    code: LlamaFileType
    matrices: Quantization
    head: Quantization


FILE_TYPES = {
    "f32": FileType(LlamaFileType.ALL_F32, Quantization.F32, Quantization.F32),
    "f16": FileType(LlamaFileType.MOSTLY_F16, Quantization.F16, Quantization.F16),
    "bf16": FileType(LlamaFileType.MOSTLY_BF16, Quantization.BF16, Quantization.BF16),
    "q8_0": FileType(LlamaFileType.MOSTLY_Q8_0, Quantization.Q8_0, Quantization.Q8_0),
    "q4_0": FileType(LlamaFileType.MOSTLY_Q4_0, Quantization.Q4_0, Quantization.Q8_0),
}
# Largest error of a stored value: a share of the largest of its block, half a step of the type and
# the float16 rounding of the step; and what that rounding comes to where steps are tiny. q4_0
# reaches its block's largest value on one side of zero, and a step less on the other.
LARGEST_ERRORS = {
    Quantization.F32: (0.0, 0.0),
    Quantization.F16: (2**-11, 2**-25),
    Quantization.BF16: (2**-8, 0.0),
    Quantization.Q8_0: (1 / 254 + 2**-11, 2**-18),
    Quantization.Q4_0: (1 / 8 + 2**-11, 2**-22),
}


class Stored(NamedTuple):
    """One tensor of the file."""

    name: str
    tensor: Tensor  # which part of ours it holds, in which layout
    quantization: Quantization
    fell_back: bool = False  # its rows are no whole number of the blocks that were wished for


@functools.cache
def stored_tensors(model: ModelConfig, file_type: str) -> tuple[Stored, ...]:
    """Every tensor of the file in its order, which is that of our table of parameters.

    llama.cpp wants biases in all norms: those that the model lacks are there as zeros.
    """
    file_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.STABLELM, model.num_layers)
    types, stored = FILE_TYPES[file_type], []
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
        wished = types.head if tensor.ours == "head/kernel" else types.matrices
        block_values, _ = gguf.GGML_QUANT_SIZES[wished]
        fits = tensor.shape[-1] % block_values == 0
        stored.append(Stored(name, tensor, wished if fits else Quantization.F16, not fits))
    return tuple(stored)


def write_file(
    checkpoint: SavedModel,
    path: Path,
    file_type: str,
    on_parameters: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes the GGUF file `path`. The host holds one of our parameters at a time.

    Args:
      file_type: key of FILE_TYPES.
      on_parameters: called with how many were written.

    Raises:
      ValueError: the checkpoint is damaged, llama.cpp could not run its tokenizer, or a value is
        too large for the type.
    """
    stored = stored_tensors(checkpoint.model, file_type)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.STABLELM])
    try:
        _add_metadata(writer, checkpoint, file_type)
        add_tokenizer(writer, checkpoint)
        for one in stored:
            block_values, block_bytes = gguf.GGML_QUANT_SIZES[one.quantization]
            shape = one.tensor.shape
            size = math.prod(shape) // block_values * block_bytes
            writer.add_tensor_info(one.name, shape, np.dtype(np.float32), size, one.quantization)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        found = tensor_values([one.tensor for one in stored], checkpoint.leaves())
        for one, values in zip(stored, found):
            writer.write_tensor_data(_rounded(one, values))
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
    writer.add_file_type(FILE_TYPES[file_type].code)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, (value, kind) in _hyperparameters(checkpoint).items():
        writer.add_key_value(f"{writer.arch}.{key}", value, kind)


def _rounded(stored: Stored, values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = gguf.quants.quantize(values, stored.quantization)
    if rounded.dtype == np.float16 and not np.isfinite(rounded).all():
        raise ValueError(
            f"{stored.name} holds {np.abs(values).max():g}, which float16 cannot; write it as bf16"
        )
    return rounded


def check_file(checkpoint: SavedModel, path: Path, file_type: str) -> None:
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
    stored = stored_tensors(checkpoint.model, file_type)
    meant = tensor_values([one.tensor for one in stored], checkpoint.leaves())
    for one, values in zip(stored, meant):
        read = gguf.quants.dequantize(written[one.name], one.quantization)
        block_values, _ = gguf.GGML_QUANT_SIZES[one.quantization]
        share, least = LARGEST_ERRORS[one.quantization]
        largest = np.abs(values).reshape(-1, block_values).max(-1, keepdims=True)
        off = np.abs(values - read).reshape(-1, block_values)
        if not (off <= share * largest + least).all():
            raise Mismatch(f"{one.name} {wrong}")
