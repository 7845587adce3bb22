"""`convert from-hf`: a Hugging Face directory as a checkpoint of ours."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from stablelm_jax.checkpoint import saving
from stablelm_jax.checkpoint.names import checkpoint_step
from stablelm_jax.checkpoint.saved_model import TOKENIZER_FILE, SavedModel
from stablelm_jax.interop import hf_config, tokenizer_files
from stablelm_jax.interop.safetensors_files import TensorFiles
from stablelm_jax.interop.tensor_map import NORM_BIASES, tensors
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import nest, parameter_table
from stablelm_jax.parallel import sharding
from stablelm_jax.tokenizer.chat import ChatTemplate, chat_template, folder_template
from stablelm_jax.tokenizer.tokenizer import HuggingFaceTokenizer, Tokenizer


@dataclasses.dataclass(frozen=True)
class Directory:
    """A Hugging Face directory, its config read, its tensors not yet."""

    path: Path
    model: ModelConfig
    tokenizer: Tokenizer
    max_positions: int  # tokens of context
    dropped: tuple[str, ...]  # fields of ModelConfig for norm biases that are zero throughout
    end_ids: tuple[int, ...]  # tokens that end a text for its generation
    chat_template: str | None  # as it stands there


def open_directory(path: Path, tokenizer: str | None = None) -> Directory:
    """Reads and checks all but the values of the tensors; takes a named tokenizer, if any.

    Raises:
      ValueError: no StableLM, damaged, or tensors are missing, too many or misshapen: all are
        listed.
    """
    values = _read_json(path / "config.json")
    if not values:
        raise ValueError(f"{path} is no directory of a model: it holds no config.json")
    files = TensorFiles(path)
    model = hf_config.read_config(values, files.shapes)
    biases = {
        switch: [tensor.name for tensor in tensors(model) if tensor.ours in ours]
        for switch, ours in NORM_BIASES.items()
    }
    # Some files of models without norm biases have none, though `transformers` expects them; in
    # others they are zero throughout, as the model was trained without.
    for switch in list(biases):
        if files.shapes.keys().isdisjoint(biases[switch]):
            del biases[switch]
            model = dataclasses.replace(model, **{switch: False})
    _check_tensors(path, model, files.shapes)
    dropped = []
    for switch, names in biases.items():
        if not any(files.read(name).view(np.uint32).any() for name in names):
            dropped.append(switch)
            model = dataclasses.replace(model, **{switch: False})
    _read_json(path / tokenizer_files.CONFIG)  # a damaged one may be needed later
    own = tokenizer_files.read_tokenizer(path, tokenizer)
    if own.largest_id >= model.vocab_size:
        raise ValueError(
            f"{path}: tokenizer {own.name} has ids up to {own.largest_id}, but the model has only "
            f"{model.vocab_size} rows: it is the tokenizer of another model"
        )
    return Directory(
        path=path,
        model=model,
        tokenizer=own,
        max_positions=int(values.get("max_position_embeddings") or 4096),
        dropped=tuple(dropped),
        end_ids=_end_ids(values | _read_json(path / "generation_config.json"), model.vocab_size),
        chat_template=folder_template(path),
    )


def chat_of(directory: Directory) -> ChatTemplate | None:
    """The directory's template as we use it: what ends an answer there, or a text, ends one here.

    Raises:
      ValueError: it is no Jinja, or of a kind that nothing here can use.
    """
    if directory.chat_template is None:
        return None
    own = directory.tokenizer
    found = chat_template(str(directory.path.resolve()), own)
    ends = [own.decode([i]) for i in directory.end_ids if i in own.special_ids]
    enders = dict.fromkeys([found.enders[0], *ends, *found.enders])
    return dataclasses.replace(found, enders=tuple(enders))


def load_params(
    directory: Directory, mesh: Mesh, on_parameters: Callable[[int], None] = lambda count: None
) -> dict[str, Any]:
    """The float32 parameters, split over the mesh's `model`; a host holds one of them at a time.

    Args:
      on_parameters: called with how many were read.
    """
    files, flat = TensorFiles(directory.path), {}
    for row in parameter_table(directory.model):
        values = np.empty(row.shape, np.float32)
        for tensor in tensors(directory.model):
            if tensor.ours == row.name:
                tensor.put(values, files.read(tensor.name))
        place = sharding.named(mesh, sharding.mesh_axes(row.axes))
        flat[row.name] = jax.device_put(values, place).block_until_ready()
        on_parameters(values.size)
    return nest(flat)


def write_checkpoint(
    of: Directory | SavedModel,
    params: Any,
    path: Path,
    chat: ChatTemplate | None,
    *,
    source: Path,
    **more: Any,
) -> None:
    """The checkpoint `path`, with its tokenizer if it is not the one that everybody has.

    Args:
      of: what is known of the model besides its parameters.
      source: where these come from. more: of the checkpoint's item `run`.
    """
    run = {
        "step": checkpoint_step(path.name),
        "model_config": dataclasses.asdict(of.model),
        "tokenizer_sha256": of.tokenizer.sha256,
        "imported": {
            "from": source.resolve().name,
            "max_positions": of.max_positions,
            "end_ids": list(of.end_ids),
            "chat_template": of.chat_template,
        },
        **({"chat": chat.to_json()} if chat else {}),
        **more,
    }
    saving.write_checkpoint(path, {"params": params}, run)
    if isinstance(of.tokenizer, HuggingFaceTokenizer):
        (path / TOKENIZER_FILE).write_bytes(of.tokenizer.content)


def _check_tensors(path: Path, model: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    expected = {t.name: t.shape for t in tensors(model) if not t.absent}
    wrong = {
        "missing": [name for name in expected if name not in shapes],
        # Old versions stored `inv_freq` of the rotary embeddings, which follows from the config.
        "unknown": [n for n in shapes if n not in expected and not n.endswith(".inv_freq")],
        "misshapen": [
            f"{name} is {list(shapes[name])}, not {list(shape)}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ],
    }
    if any(wrong.values()):
        lines = [f"  {kind}: {line}" for kind, found in wrong.items() for line in _by_layers(found)]
        counts = ", ".join(f"{len(found)} {kind}" for kind, found in wrong.items() if found)
        raise ValueError(
            "\n".join(["tensors that do not fit config.json:", *lines])
            + f"\n{path}: {counts} of {len(expected)} tensors; nothing was written. Is config.json"
            " that of these files, and are they whole?"
        )


def _by_layers(found: Iterable[str]) -> list[str]:
    """One line for what is the same in several layers."""
    layers: dict[str, list[str]] = {}
    for text in found:
        same = re.sub(r"(?<=layers\.)\d+", "*", text, count=1)
        layers.setdefault(same, []).extend(re.findall(r"layers\.(\d+)", text))
    return [f"{x} (layers {', '.join(numbers)})" if numbers else x for x, numbers in layers.items()]


def _end_ids(config: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    found = config.get("eos_token_id")
    if found is None:
        return ()
    ids = tuple(found) if isinstance(found, list) else (found,)
    for number in ids:
        if not (isinstance(number, int) and 0 <= number < vocab_size):
            raise ValueError(f"eos_token_id is {number!r}, no token of {vocab_size} rows")
    return ids


def _read_json(path: Path) -> dict[str, Any]:
    """Its object; an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no object; it is not a model's, or damaged: fetch it again")
    return values
