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

from stablelm_jax.checkpoint.saved_model import TOKENIZER_FILE
from stablelm_jax.interop import hf_config, names, tokenizer_files
from stablelm_jax.interop.safetensors_files import TensorFiles
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import nest, parameter_table
from stablelm_jax.parallel import sharding
from stablelm_jax.tokenizer.tokenizer import ARCADE100K, HuggingFaceTokenizer, Tokenizer

# Buffers that old versions stored; they follow from the config.
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True)
class Directory:
    """A Hugging Face directory, its config read, its tensors not yet.

    Attributes:
      dropped: fields of ModelConfig for norm biases that are there, but zero throughout.
      end_ids: tokens that end a text for its generation.
    """

    path: Path
    model: ModelConfig
    tokenizer: Tokenizer
    max_positions: int
    dropped: tuple[str, ...]
    end_ids: tuple[int, ...]
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
    with TensorFiles(path) as files:
        model = hf_config.read_config(values, files.shapes)
        model = _without_absent_biases(model, files.shapes)
        _check_tensors(path, model, files.shapes)
        dropped = _zero_biases(model, files)
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
    """The float32 parameters, each made on its devices from the part of the files it needs.

    A host holds one tensor of ours at a time, or its devices' share of it.

    Args:
      on_tensor: called with the bytes, in float32, of each tensor that is there.
    """
    table = parameter_table(directory.model)
    places = {row.name: sharding.named(mesh, sharding.mesh_axes(row.axes)) for row in table}
    parts: dict[str, list[names.Tensor]] = {row.name: [] for row in table}
    for tensor in names.tensors(directory.model):
        if not tensor.absent:
            parts[tensor.ours].append(tensor)
    flat = {}
    with TensorFiles(directory.path) as files:
        for row in table:
            read = _reader(files, parts[row.name], row.shape)
            flat[row.name] = jax.make_array_from_callback(row.shape, places[row.name], read)
            flat[row.name].block_until_ready()
            on_tensor(flat[row.name].nbytes)
    return nest(flat)


def _reader(files: TensorFiles, parts: list[names.Tensor], shape: tuple[int, ...]):
    """f(index): the values of one of our tensors at `index`, float32."""
    stacked = len(parts[0].index)  # leading dims of ours that run over tensors of theirs

    def read(index: tuple[slice, ...]) -> np.ndarray:
        spans = [range(*s.indices(size)) for s, size in zip(index, shape)]
        values = np.empty([len(span) for span in spans], np.float32)
        for part in parts:
            if all(i in span for i, span in zip(part.index, spans)):
                here = tuple(i - span.start for i, span in zip(part.index, spans))
                wanted = part.their_index(spans[stacked:], shape[stacked:])
                values[here] = part.part_of_ours(
                    files.read(part.name, wanted), values.shape[stacked:]
                )
        return values

    return read


def _without_absent_biases(model: ModelConfig, present: Iterable[str]) -> ModelConfig:
    """Some files of models without norm biases have none, though `transformers` expects them."""
    for switch in ("block_norm_bias", "final_norm_bias"):
        biases = _biases(model, switch)
        if not any(tensor.name in present for tensor in biases):
            model = dataclasses.replace(model, **{switch: False})
    return model


def _biases(model: ModelConfig, switch: str) -> list[names.Tensor]:
    return [t for t in names.tensors(model) if names.norm_bias_switch(t.ours) == switch]


def _zero_biases(model: ModelConfig, files: TensorFiles) -> tuple[str, ...]:
    """The switches whose norm biases are zero throughout, as in models trained without them."""

    def all_zero(switch: str) -> bool:
        return not any(files.read(t.name).view(np.uint32).any() for t in _biases(model, switch))

    switches = ("block_norm_bias", "final_norm_bias")
    return tuple(s for s in switches if getattr(model, s) and all_zero(s))


def _check_tensors(path: Path, model: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    expected = {t.name: t.shape for t in names.tensors(model) if not t.absent}
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


def run_item(directory: Directory, step: int) -> dict[str, Any]:
    """What the checkpoint says of itself (its item `run`)."""
    return {
        "step": step,
        "model_config": dataclasses.asdict(directory.model),
        "tokenizer_sha256": directory.tokenizer.sha256,
        "imported": {
            "from": directory.path.resolve().name,
            "max_positions": directory.max_positions,
            "end_ids": list(directory.end_ids),
            "chat_template": directory.chat_template,
        },
    }


def write_tokenizer(tokenizer: Tokenizer, checkpoint: Path) -> None:
    """Into the checkpoint, unless it is the one that every installation has."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        (checkpoint / TOKENIZER_FILE).write_bytes(tokenizer.content)
    else:
        assert tokenizer.name == ARCADE100K
