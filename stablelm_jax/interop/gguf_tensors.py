"""Which tensors a GGUF file of architecture `stablelm` holds, and what they are stored in.

What llama.cpp wants: its src/models/stablelm.cpp and conversion/stablelm.py; the names come from
the table in PyPI `gguf`. Rotary turns dims half a span apart there too, so no row is permuted.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quantization
from gguf import LlamaFileType

from stablelm_jax.interop import names
from stablelm_jax.interop.verify import Limit
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import specs_by_name


@dataclasses.dataclass(frozen=True)
class FileType:
    """What matrices are stored in; norms and biases are float32 in every file.

    Attributes:
      code: as `general.file_type` says it.
      matrices: of the embedding and all matrices but the head.
      head: of the head.
      limit: how far llama.cpp's logits may be from ours. It rounds activations too: to the type of
        the matrix, or to eight bits.
    """

    code: LlamaFileType
    matrices: Quantization
    head: Quantization
    limit: Limit


# The head of a 4-bit file is finer, as llama.cpp's own quantiser has it: q6_K there, which PyPI
# `gguf` cannot write. The limits are several times what was measured (docs/interop.md).
FILE_TYPES = {
    "f32": FileType(LlamaFileType.ALL_F32, Quantization.F32, Quantization.F32, Limit(1e-3, 1e-6)),
    "f16": FileType(
        LlamaFileType.MOSTLY_F16, Quantization.F16, Quantization.F16, Limit(0.06, 1e-4)
    ),
    "bf16": FileType(
        LlamaFileType.MOSTLY_BF16, Quantization.BF16, Quantization.BF16, Limit(0.6, 5e-3)
    ),
    "q8_0": FileType(
        LlamaFileType.MOSTLY_Q8_0, Quantization.Q8_0, Quantization.Q8_0, Limit(1.5, 0.04)
    ),
    "q4_0": FileType(
        LlamaFileType.MOSTLY_Q4_0, Quantization.Q4_0, Quantization.Q8_0, Limit(8.0, 2.0)
    ),
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of the file.

    Attributes:
      name: in the file.
      tensor: which part of ours it holds, in which layout.
      quantization: of its values.
      fell_back: its rows are no whole number of the blocks that were wished for.
    """

    name: str
    tensor: names.Tensor
    quantization: Quantization
    fell_back: bool = False

    @property
    def num_bytes(self) -> int:
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[self.quantization]
        return math.prod(self.tensor.shape) // block_values * block_bytes

    def values(self, leaf: np.ndarray | None) -> np.ndarray:
        """In float32, of the whole of ours; zeros where the model has no such parameter."""
        if leaf is None:
            return np.zeros(self.tensor.shape, np.float32)
        return np.ascontiguousarray(self.tensor.theirs(leaf))


@functools.cache
def stored_tensors(model: ModelConfig, file_type: str) -> tuple[Stored, ...]:
    """Every tensor of the file in its order, which is that of our table of parameters.

    llama.cpp wants biases in all norms: those that the model lacks are there as zeros.
    """
    file_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.STABLELM, model.num_layers)
    tensors = (_of_all_heads(tensor, model) for tensor in names.tensors(model))
    return tuple(
        _stored(file_names.get_name(tensor.name, (".weight", ".bias")), tensor, file_type)
        for tensor in tensors
        if tensor is not None
    )


def _of_all_heads(tensor: names.Tensor, model: ModelConfig) -> names.Tensor | None:
    """The norms of a layer's heads are one tensor [heads, head size] here: None for all but one."""
    if len(tensor.index) < 2:
        return tensor
    layer, head = tensor.index
    if head:
        return None
    name = tensor.name.replace(".norms.0", "")
    shape = specs_by_name(model)[tensor.ours].shape[1:]
    return dataclasses.replace(tensor, name=name, shape=shape, index=(layer,))


def _stored(name: str, tensor: names.Tensor, file_type: str) -> Stored:
    if len(tensor.shape) < 2 or "norm" in tensor.ours:
        return Stored(name, tensor, Quantization.F32)
    types = FILE_TYPES[file_type]
    wished = types.head if tensor.ours == "head/kernel" else types.matrices
    block_values, _ = gguf.GGML_QUANT_SIZES[wished]
    if tensor.shape[-1] % block_values:
        return Stored(name, tensor, Quantization.F16, fell_back=True)
    return Stored(name, tensor, wished)
