"""Adapters as a directory of PEFT's (huggingface/peft), there and back.

`adapter_model.safetensors` holds A as [rank, inputs] and B as [outputs, rank] of each matrix of
each layer, under the names of `transformers`' modules; `adapter_config.json` says how they are
added.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from stablelm_jax.interop.tensor_map import Tensor, tensors
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.lora import A, B, Lora

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."  # of every name: PEFT's two wrappers around the model
# What of PEFT's ours do not have: empty, False or none in its config.
_UNUSED = ("bias", "fan_in_fan_out", "use_dora", "lora_bias", "modules_to_save")
_UNUSED += ("rank_pattern", "alpha_pattern", "alora_invocation_tokens", "layer_replication")
_UNUSED += ("trainable_token_indices", "target_parameters", "use_qalora", "use_bdlora")
# First values that leave the weights under the adapters as they were; those of pissa do not.
_FIRST = (None, True, False, "gaussian", "eva", "orthogonal")


def write_adapters(folder: Path, model: ModelConfig, lora: Lora, flat: Any, base: str) -> None:
    """Makes `folder`. `flat`: our adapters by name; `base`: what PEFT is told that the model is."""
    folder.mkdir(parents=True)
    found, modules = {}, set()
    for (target, _), tensor in _targets(model).items():
        if target in lora.targets:
            a, b = (flat[tensor.ours.removesuffix("kernel") + x][tensor.index] for x in (A, B))
            theirs = {"A": a.reshape(-1, lora.rank).T, "B": b.reshape(lora.rank, -1).T}
            found |= {_name(tensor, x): np.ascontiguousarray(v) for x, v in theirs.items()}
            modules.add(tensor.name.split(".")[-2])
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_adapters(folder: Path, model: ModelConfig) -> tuple[Lora, dict[str, np.ndarray]]:
    """The adapters in a directory of PEFT's, for this model: ours by name, float32.

    A layer that has none of a target gets zeros.

    Raises:
      ValueError: no LoRA, damaged, of another model, or with something that ours do not have.
    """
    config, stored = _read(folder)
    matrices, found = _targets(model), {}
    for key, tensor in matrices.items():
        a, b = (stored.pop(_name(tensor, part), None) for part in "AB")
        if (a is None) != (b is None):
            lost = _name(tensor, "A" if a is None else "B")
            raise ValueError(f"{folder / WEIGHTS} holds no {lost}: it is not whole; fetch it again")
        if a is not None:
            found[key] = {"A": a, "B": b}
    if stored:
        raise ValueError(
            f"{folder / WEIGHTS}: {len(stored)} tensors, such as {min(stored)}, are of no matrix "
            "of this model's layers: they belong to another model, or adapt its embedding or head"
        )
    if not found:
        raise ValueError(f"{folder / WEIGHTS} is empty: it holds no adapters; fetch it again")
    rank, alpha = config["r"], float(config["lora_alpha"])
    if config.get("use_rslora"):  # scaled by alpha / sqrt(rank): Kalajdzievski 2023, 2312.03732
        alpha *= math.sqrt(rank)
    lora = Lora(rank, alpha, tuple(dict.fromkeys(target for target, _ in found)))
    flat = {row.name: np.zeros(row.shape, np.float32) for row in lora.table(model)}
    for key, halves in found.items():
        tensor = matrices[key]
        shapes = {"A": (rank, tensor.shape[1]), "B": (tensor.shape[0], rank)}
        for part, values in halves.items():
            if values.shape != shapes[part]:
                told = f"{list(values.shape)}, not {list(shapes[part])}"
                raise ValueError(f"{folder}: {_name(tensor, part)} is {told}")
            ours = flat[tensor.ours.removesuffix("kernel") + (A if part == "A" else B)]
            ours[tensor.index] = values.T.reshape(ours.shape[1:])
    return lora, flat


def _targets(model: ModelConfig) -> dict[tuple[str, int], Tensor]:
    """{(our name of a target, layer): the tensor of `transformers` that it adapts}."""
    matrices = [t for t in tensors(model) if t.index and t.num_input_dims]
    return {(t.ours.split("/")[-2], t.index[0]): t for t in matrices}


def _name(tensor: Tensor, part: str) -> str:
    return f"{_PREFIX}{tensor.name.removesuffix('weight')}lora_{part}.weight"


def _read(folder: Path) -> tuple[Mapping[str, Any], dict[str, np.ndarray]]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}; give the folder that PEFT wrote")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        stored = load_file(folder / WEIGHTS)
    except (ValueError, SafetensorError, OSError) as error:
        raise ValueError(f"{folder} cannot be read ({error}); fetch it again") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{folder / CONFIG} is of no LoRA; only its adapters are read")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or config[key] <= 0:
            told = f"{key} is {config.get(key)}, no number above 0"
            raise ValueError(f"{folder / CONFIG}: {told}; take the file that PEFT wrote")
    if (first := config.get("init_lora_weights")) not in _FIRST:
        raise ValueError(
            f"{folder / CONFIG}: init_lora_weights is {first!r}, which may change the weights "
            "under the adapters; merge them with PEFT (merge_and_unload) and take the model with "
            "convert from-hf, or save them with path_initial_model_for_weight_conversion"
        )
    for key in _UNUSED:
        if config.get(key) not in (None, False, "none", [], {}):
            raise ValueError(
                f"{folder / CONFIG}: {key} is {config[key]!r}, which our adapters do not have; "
                "merge them with PEFT (merge_and_unload) and take the model with convert from-hf"
            )
    values = {name: np.asarray(value, np.float32) for name, value in stored.items()}
    return config, values
