"""`convert to-gguf`: a checkpoint of ours as one file that llama.cpp runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quantization

from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.interop.gguf_tensors import FILE_TYPES, Stored, stored_tensors
from stablelm_jax.interop.gguf_tokens import add_vocabulary, vocabulary
from stablelm_jax.interop.tokenizer_files import tokenizer_json
from stablelm_jax.interop.verify import Mismatch
from stablelm_jax.model.parameters import count_parameters, specs_by_name

# Largest error of a stored value: a share of the largest of its block, half a step of the type and
# the float16 rounding of the step; and what that rounding comes to where steps are tiny. q4_0
# reaches its block's largest value on one side of zero, and a step less on the other.
_ERRORS = {
    Quantization.F32: (0.0, 0.0),
    Quantization.F16: (2**-11, 2**-25),
    Quantization.BF16: (2**-8, 0.0),
    Quantization.Q8_0: (1 / 254 + 2**-11, 2**-18),
    Quantization.Q4_0: (1 / 8 + 2**-11, 2**-22),
}


def write_file(
    checkpoint: SavedModel,
    path: Path,
    *,
    file_type: str,
    on_tensor: Callable[[int], None] = lambda size: None,
) -> None:
    """Writes the GGUF file `path`. The host holds one of our parameters at a time.

    Args:
      file_type: key of FILE_TYPES.
      on_tensor: called with the bytes, in float32, of each parameter that is written.

    Raises:
      ValueError: the checkpoint is damaged, llama.cpp could not run its tokenizer, or a value is
        too large for the type.
    """
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.STABLELM])
    try:
        _add_metadata(writer, checkpoint, file_type)
        _add_tokenizer(writer, checkpoint)
        for one in stored_tensors(checkpoint.model, file_type):
            writer.add_tensor_info(
                one.name, one.tensor.shape, np.dtype(np.float32), one.num_bytes, one.quantization
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_tensors(writer, checkpoint, file_type, on_tensor)
    finally:
        writer.close()


def _add_metadata(writer: gguf.GGUFWriter, checkpoint: SavedModel, file_type: str) -> None:
    model = checkpoint.model
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"{_origin(checkpoint)} {checkpoint.name}")
    writer.add_size_label(gguf.size_label(count_parameters(model), 0, 0, 0))
    writer.add_file_type(FILE_TYPES[file_type].code)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(checkpoint.max_positions)
    writer.add_embedding_length(model.width)
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(model.feed_forward_width)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.num_kv_heads)
    writer.add_rope_dimension_count(model.rotary_size)
    writer.add_rope_freq_base(model.rotary_theta)
    writer.add_layer_norm_eps(model.norm_epsilon)
    writer.add_parallel_residual(model.parallel_residual)


def _origin(checkpoint: SavedModel) -> str:
    """Name of the run, or of the directory that was imported."""
    if "config" in checkpoint.run:
        return checkpoint.run["config"]["name"]
    return checkpoint.run["imported"]["from"]


def _add_tokenizer(writer: gguf.GGUFWriter, checkpoint: SavedModel) -> None:
    tokenizer = checkpoint.tokenizer
    add_vocabulary(writer, vocabulary(tokenizer_json(tokenizer), checkpoint.model.vocab_size))
    writer.add_bos_token_id(tokenizer.eod)
    writer.add_eos_token_id(checkpoint.end_ids[0])
    writer.add_pad_token_id(tokenizer.eod)
    if checkpoint.chat_template:
        writer.add_chat_template(checkpoint.chat_template)


def _write_tensors(
    writer: gguf.GGUFWriter, checkpoint: SavedModel, file_type: str, on_tensor: Callable
) -> None:
    for leaf, parts in _parts(checkpoint, file_type):
        for part in parts:
            writer.write_tensor_data(_stored_values(part, part.values(leaf)))
        on_tensor(0 if leaf is None else leaf.nbytes)


def _parts(
    checkpoint: SavedModel, file_type: str
) -> Iterator[tuple[np.ndarray | None, Iterator[Stored]]]:
    """Each of our parameters, None where the model has none, and what is stored of it."""
    present = specs_by_name(checkpoint.model)
    leaves = checkpoint.leaves()
    stored = stored_tensors(checkpoint.model, file_type)
    for ours, parts in itertools.groupby(stored, lambda one: one.tensor.ours):
        name, leaf = next(leaves) if ours in present else (ours, None)
        assert name == ours, (name, ours)
        yield leaf, parts


def _stored_values(stored: Stored, values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = gguf.quants.quantize(values, stored.quantization)
    if rounded.dtype == np.float16 and not np.isfinite(rounded).all():
        raise ValueError(
            f"{stored.name} holds {np.abs(values).max():g}, which float16 cannot; write it as bf16"
        )
    return rounded


def check_values(checkpoint: SavedModel, path: Path, file_type: str) -> None:
    """Reads every tensor of a file back and compares it with the checkpoint.

    Raises:
      Mismatch: a value is further off than its type explains.
    """
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for leaf, parts in _parts(checkpoint, file_type):
        for part in parts:
            read = gguf.quants.dequantize(found[part.name].data, part.quantization)
            if not _is_rounded(part.values(leaf), read, part.quantization):
                raise Mismatch(f"{part.name} was not written as it should be; try again")


def _is_rounded(values: np.ndarray, read: np.ndarray, quantization: Quantization) -> bool:
    block_values, _ = gguf.GGML_QUANT_SIZES[quantization]
    share, least = _ERRORS[quantization]
    blocks, read = (x.reshape(-1, block_values) for x in (values, read))
    largest = np.abs(blocks).max(-1, keepdims=True)
    return bool((np.abs(blocks - read) <= share * largest + least).all())
