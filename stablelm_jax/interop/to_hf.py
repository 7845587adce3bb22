"""`convert to-hf`: a checkpoint of ours as a directory that `transformers` loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from stablelm_jax import __version__
from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.interop import hf_config, tokenizer_files
from stablelm_jax.interop.safetensors_files import DTYPES, TensorFiles, write_tensors
from stablelm_jax.interop.tensor_map import tensor_values, tensors
from stablelm_jax.model.parameters import count_parameters


def write_directory(
    checkpoint: SavedModel,
    folder: Path,
    dtype: str,
    max_file_bytes: int,
    revision: str,
    on_parameters: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes weights, configs, tokenizer and model card into `folder`, which is made.

    The host holds one of our parameters and one file at a time.

    Args:
      dtype: the type of the weights, a key of DTYPES.
      revision: name of the branch on the Hub that it is meant for.
      on_parameters: called with how many were written.

    Raises:
      ValueError: the checkpoint is damaged, or a value is too large for `dtype`.
    """
    folder.mkdir(parents=True)
    _write_weights(checkpoint, folder, dtype, max_file_bytes, on_parameters)
    tokenizer, end = checkpoint.tokenizer, checkpoint.end_ids
    end_id = end if len(end) > 1 else end[0]
    ids = {"bos_token_id": tokenizer.eod, "eos_token_id": end_id, "pad_token_id": tokenizer.eod}
    config = hf_config.write_config(
        checkpoint.model, dtype=dtype, max_positions=checkpoint.max_positions, token_ids=ids
    )
    tokenizer_config = tokenizer_files.tokenizer_config(
        tokenizer, tokenizer.decode(end[:1]), checkpoint.max_positions, checkpoint.chat_template
    )
    for name, values in (
        ("config.json", config),
        ("generation_config.json", ids),
        (tokenizer_files.CONFIG, tokenizer_config),
    ):
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    if checkpoint.chat_template:  # older versions read it in tokenizer_config.json alone
        jinja = checkpoint.chat_template.encode()
        (folder / tokenizer_files.CHAT_TEMPLATE).write_bytes(jinja)
    (folder / tokenizer_files.TOKENIZER).write_bytes(tokenizer_files.tokenizer_json(tokenizer))
    (folder / "README.md").write_text(_model_card(checkpoint, dtype, revision), encoding="utf-8")


def _write_weights(checkpoint, folder, dtype, max_file_bytes, on_parameters) -> None:
    stored = tensors(checkpoint.model)

    def rounded() -> Iterator[np.ndarray]:
        for tensor, values in zip(stored, tensor_values(stored, checkpoint.leaves())):
            yield _rounded(values, dtype, tensor.name)
            on_parameters(0 if tensor.absent else values.size)

    shapes = {tensor.name: tensor.shape for tensor in stored}
    write_tensors(folder, shapes, rounded(), dtype, max_file_bytes)


def _rounded(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = values.astype(DTYPES[dtype][1])
    if not np.isfinite(rounded).all():
        raise ValueError(
            f"{name} holds {np.abs(values).max():g}, which {dtype} cannot; write it as bfloat16"
        )
    return rounded


def check_bits(checkpoint: SavedModel, folder: Path, dtype: str) -> None:
    """Reads every tensor of a directory back; a ValueError where a bit is not the checkpoint's."""
    files, stored = TensorFiles(folder), tensors(checkpoint.model)
    for tensor, values in zip(stored, tensor_values(stored, checkpoint.leaves())):
        meant = _rounded(values, dtype, tensor.name).astype(np.float32)
        if not np.array_equal(files.read(tensor.name), meant):
            raise ValueError(f"{tensor.name} was not written as it should be; try again")


def _model_card(checkpoint: SavedModel, dtype: str, revision: str) -> str:
    """README.md of a Hugging Face directory: front matter, use, recipe, data, origin."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"thousands": "{:,}".format, "settings": _settings}
    run = checkpoint.run
    parent = run.get("origin", {}).get("parent") or ""
    return environment.get_template("card.md.jinja").render(
        checkpoint=checkpoint,
        model=checkpoint.model,
        parameters=count_parameters(checkpoint.model),
        run=run,
        config=run.get("config", {}),
        total=sum(run.get("tokens", {}).values()),
        parent=parent.rstrip("/").rpartition("/")[2],
        dtype=dtype,
        revision=revision,
        version=__version__,
    )


def _settings(group: Mapping[str, Any]) -> str:
    """A group of the config as one cell of a table."""
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in group.items()
        if value is not None
    )
