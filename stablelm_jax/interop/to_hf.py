"""`convert to-hf`: a checkpoint of ours as a directory that `transformers` loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.interop import hf_config, tokenizer_files
from stablelm_jax.interop.card import model_card
from stablelm_jax.interop.safetensors_files import DTYPES, TensorFiles, tensor_writer
from stablelm_jax.interop.tensor_map import Tensor, tensors, tensors_by_parameter

MAX_FILE_BYTES = 5_000_000_000  # as the Hub's tools split


def write_directory(
    checkpoint: SavedModel,
    folder: Path,
    *,
    dtype: str = "bfloat16",
    max_file_bytes: int = MAX_FILE_BYTES,
    revision: str | None = None,
    on_tensor: Callable[[int], None] = lambda size: None,
) -> None:
    """Writes weights, configs, tokenizer and model card into `folder`, which is made.

    The host holds one of our parameters at a time.

    Args:
      dtype: the type of the weights, a key of DTYPES.
      revision: name of the branch it is meant for, by default the checkpoint's.
      on_tensor: called with the bytes, in float32, of each parameter that is written.

    Raises:
      ValueError: the checkpoint is damaged, or a value is too large for `dtype`.
    """
    folder.mkdir(parents=True)
    _write_weights(checkpoint, folder, dtype, max_file_bytes, on_tensor)
    tokenizer, end = checkpoint.tokenizer, checkpoint.end_ids
    end_id = end if len(end) > 1 else end[0]
    ids = {"bos_token_id": tokenizer.eod, "eos_token_id": end_id, "pad_token_id": tokenizer.eod}
    config = hf_config.write_config(
        checkpoint.model, dtype=dtype, max_positions=checkpoint.max_positions, token_ids=ids
    )
    tokenizer_config = tokenizer_files.tokenizer_config(
        tokenizer,
        eos=tokenizer.decode(end[:1]),
        max_positions=checkpoint.max_positions,
        chat_template=checkpoint.chat_template,
    )
    for name, values in (
        ("config.json", config),
        ("generation_config.json", ids),
        (tokenizer_files.CONFIG, tokenizer_config),
    ):
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    (folder / tokenizer_files.TOKENIZER).write_bytes(tokenizer_files.tokenizer_json(tokenizer))
    (folder / "README.md").write_text(model_card(checkpoint, dtype, revision or checkpoint.name))


def _write_weights(checkpoint, folder, dtype, max_file_bytes, on_tensor) -> None:
    in_order = sorted(tensors(checkpoint.model), key=_in_order_of_use)
    shapes = {tensor.name: tensor.shape for tensor in in_order}
    parts = tensors_by_parameter(checkpoint.model)
    with tensor_writer(folder, shapes, dtype, max_file_bytes) as write:
        for name, leaf in checkpoint.leaves():
            for tensor in parts[name]:
                write(tensor.name, _rounded(tensor.theirs(leaf), dtype, tensor.name))
            on_tensor(leaf.nbytes)
        for tensor in in_order:
            if tensor.absent:
                write(tensor.name, np.zeros(tensor.shape, np.float32))


def _in_order_of_use(tensor: Tensor) -> tuple[int, ...]:
    """Embedding, layer by layer, what follows them."""
    if tensor.index:
        return (1, tensor.index[0])
    return (0,) if tensor.ours == "embed/embedding" else (2,)


def _rounded(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = values.astype(DTYPES[dtype][1])
    if not np.isfinite(rounded).all():
        raise ValueError(
            f"{name} holds {np.abs(values).max():g}, which {dtype} cannot; write it as bfloat16"
        )
    return rounded


def check_bits(checkpoint: SavedModel, folder: Path, dtype: str) -> None:
    """Reads every tensor of a directory back and compares it with the checkpoint, bit for bit.

    Raises:
      ValueError: one differs.
    """
    files, parts = TensorFiles(folder), tensors_by_parameter(checkpoint.model)
    for name, leaf in checkpoint.leaves():
        for tensor in parts[name]:
            meant = _rounded(tensor.theirs(leaf), dtype, tensor.name).astype(np.float32)
            if not np.array_equal(files.read(tensor.name), meant):
                raise ValueError(f"{tensor.name} was not written as it should be; try again")
