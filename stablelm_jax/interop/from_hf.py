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
from stablelm_jax.checkpoint.saved_model import TOKENIZER_FILE
from stablelm_jax.interop import hf_config, tokenizer_files
from stablelm_jax.interop.safetensors_files import TensorFiles
from stablelm_jax.interop.tensor_map import NORM_BIASES, tensors, tensors_by_parameter
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import nest, parameter_table
from stablelm_jax.parallel import sharding
from stablelm_jax.tokenizer.tokenizer import ARCADE100K, HuggingFaceTokenizer, Tokenizer

# Buffers that old versions stored; they follow from the config.
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True)
class Directory:
    """A Hugging Face directory, its config read, its tensors not yet."""

    path: Path
    model: ModelConfig
    tokenizer: Tokenizer
    max_positions: int  # tokens of context
    dropped: tuple[str, ...]  # fields of ModelConfig for norm biases that are zero throughout
    end_ids: tuple[int, ...]  # tokens that end a text for its generation
    chat_template: str | None


def open_directory(path: Path, tokenizer: str | None = None) -> Directory:
    """Reads and checks all but the values of the tensors.

    Args:
      tokenizer: take this one instead of the directory's.

    Raises:
      ValueError: no StableLM, damaged, or tensors are missing, too many or misshapen: all are
        listed.
    """
    values = _read_json(path / "config.json", required=True)
    files = TensorFiles(path)
    model = hf_config.read_config(values, files.shapes)
    biases = {
        switch: [tensor.name for tensor in tensors(model) if tensor.ours in ours]
        for switch, ours in NORM_BIASES.items()
    }
    # Some files of models without norm biases have none, though `transformers` expects them; in
    # others they are zero throughout, as the model was trained without.
    absent = [s for s, names in biases.items() if files.shapes.keys().isdisjoint(names)]
    model = dataclasses.replace(model, **dict.fromkeys(absent, False))
    _check_tensors(path, model, files.shapes)

    def is_zero(name: str) -> bool:
        return not files.read(name).view(np.uint32).any()

    left = {switch: names for switch, names in biases.items() if switch not in absent}
    dropped = tuple(switch for switch, names in left.items() if all(map(is_zero, names)))
    model = dataclasses.replace(model, **dict.fromkeys(dropped, False))
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
        max_positions=hf_config.max_positions(values),
        dropped=dropped,
        end_ids=_end_ids(values, _read_json(path / "generation_config.json"), model.vocab_size),
        chat_template=_chat_template(path),
    )


def load_params(
    directory: Directory, mesh: Mesh, on_tensor: Callable[[int], None] = lambda size: None
) -> dict[str, Any]:
    """The float32 parameters, split over the mesh's `model`; a host holds one of them at a time.

    Args:
      on_tensor: called with the bytes, in float32, of each parameter that is there.
    """
    files, parts, flat = TensorFiles(directory.path), tensors_by_parameter(directory.model), {}
    for row in parameter_table(directory.model):
        values = np.empty(row.shape, np.float32)
        for tensor in parts[row.name]:
            tensor.put(values, files.read(tensor.name))
        place = sharding.named(mesh, sharding.mesh_axes(row.axes))
        flat[row.name] = jax.device_put(values, place).block_until_ready()
        on_tensor(values.nbytes)
    return nest(flat)


def write_checkpoint(directory: Directory, params: Any, path: Path, step: int) -> None:
    """The checkpoint `path`, with its tokenizer if it is not the one that everybody has."""
    imported = {
        "from": directory.path.resolve().name,
        "max_positions": directory.max_positions,
        "end_ids": list(directory.end_ids),
        "chat_template": directory.chat_template,
    }
    run = {
        "step": step,
        "model_config": dataclasses.asdict(directory.model),
        "tokenizer_sha256": directory.tokenizer.sha256,
        "imported": imported,
    }
    saving.write_checkpoint(path, saving.Checkpoint(params, None, run))
    if isinstance(directory.tokenizer, HuggingFaceTokenizer):
        (path / TOKENIZER_FILE).write_bytes(directory.tokenizer.content)
    else:
        assert directory.tokenizer.name == ARCADE100K


def _check_tensors(path: Path, model: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    expected = {t.name: t.shape for t in tensors(model) if not t.absent}
    missing = [name for name in expected if name not in shapes]
    extra = [name for name in shapes if name not in expected and not _DERIVED.fullmatch(name)]
    misshapen = [
        f"{name} is {_text(shapes[name])}, not {_text(shape)}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    if not (missing or extra or misshapen):
        return
    wrong = (("missing", missing), ("unknown", extra), ("misshapen", misshapen))
    lines = [f"  {kind}: {line}" for kind, found in wrong for line in _by_layers(found)]
    counts = ", ".join(f"{len(found)} {kind}" for kind, found in wrong if found)
    raise ValueError(
        "\n".join(["tensors that do not fit config.json:", *lines])
        + f"\n{path}: {counts} of {len(expected)} tensors; nothing was written. Is config.json that"
        " of these files, and are they whole?"
    )


def _by_layers(found: Iterable[str]) -> list[str]:
    """One line for what is the same in several layers."""
    layers: dict[str, list[str]] = {}
    for text in found:
        match = re.search(r"(?<=layers\.)\d+", text)
        key = text if match is None else f"{text[: match.start()]}*{text[match.end() :]}"
        layers.setdefault(key, []).append(match.group() if match else "")
    return [
        key if not numbers[0] else f"{key} (layers {', '.join(numbers)})"
        for key, numbers in layers.items()
    ]


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _end_ids(
    config: Mapping[str, Any], generation: Mapping[str, Any], vocab_size: int
) -> tuple[int, ...]:
    found = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = tuple(found) if isinstance(found, list) else () if found is None else (found,)
    for number in ids:
        if not (isinstance(number, int) and 0 <= number < vocab_size):
            raise ValueError(f"eos_token_id is {number!r}, no token of {vocab_size} rows")
    return ids


def _chat_template(path: Path) -> str | None:
    file = path / tokenizer_files.CHAT_TEMPLATE
    if file.is_file():
        return file.read_text()
    found = _read_json(path / tokenizer_files.CONFIG).get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found


def _read_json(path: Path, required: bool = False) -> dict[str, Any]:
    if not path.is_file():
        if required:
            raise ValueError(f"{path.parent}: is no directory of a model: it holds no {path.name}")
        return {}
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no object; it is not a model's, or damaged: fetch it again")
    return values
