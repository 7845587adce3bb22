"""A config by its dotted keys: read, set, compared with another one, as a plain dict."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from ml_collections import ConfigDict

from stablelm_jax.config.tree import FIELDS, default_config, flatten

# Fields that change nothing of what a step computes; a group stands for all its fields.
HARMLESS = (
    *("name", "checkpoint", "evaluation", "samples", "writers", "profile", "branch"),
    "report",
    *("data.root", "data.cache", "data.cache_gb", "data.prefetch_batches", "data.check_shards"),
    *("training.num_steps", "training.log_every", "training.hang_seconds", "parallel.target"),
    *("training.check_replicas_every", "training.stop_after_skipped", "training.layer_norms_every"),
)
# Fields that change the order in which sums are taken: the losses stay equal up to rounding.
ROUNDING = (
    *("parallel.data", "parallel.model", "parallel.replica", "parallel.zero1", "parallel.fsdp"),
    *("training.accumulation", "training.remat", "training.unroll", "training.attention"),
    *("training.cross_entropy", "training.norms", "training.deterministic"),
)
# Fields that make a run this run: no checkpoint of other values is gone on from. The tokenizer is
# another such, by its hash.
IDENTITY = (
    *("model", "lora", "seed", "data.sequence_length", "data.loss_on_first_token"),
    *("data.packing", "data.loss_on", "optimizer.kind"),
)
# What people type who know other software, by our field.
_ELSEWHERE = {
    "schedule.peak": "lr learning_rate max_lr peak_lr",
    "schedule.minimum": "min_lr lr_min lr_end learning_rate_min min_learning_rate",
    "schedule.warmup_steps": "warmup warmup_iters num_warmup_steps warmup_ratio warmup_fraction",
    "optimizer.kind": "optimizer optim optimizer_name optimizer_type",
    "optimizer.b2": "beta2 adam_beta2",
    "optimizer.clip_norm": "clip grad_clip gradient_clipping gradient_clip_val max_grad_norm",
    "training.num_steps": "steps max_steps num_train_steps max_iters train_iters iterations epochs",
    "training.accumulation": "gradient_accumulation_steps grad_accum micro_batch_size",
    "training.dtype": "dtype precision mixed_precision bf16 fp16",
    "training.remat": "gradient_checkpointing activation_checkpointing recompute",
    "data.batch_size": "batch batch_size bs train_batch_size global_batch_size",
    "data.sequence_length": "seq_len seq_length max_seq_len context_length block_size n_ctx",
    "data.packing": "packing_strategy sample_packing pack packed",
    "data.loss_on": "train_on_inputs assistant_only_loss completion_only_loss mask_inputs",
    "data.root": "data_dir data_path dataset dataset_dir",
    "checkpoint.every": "save_every save_steps save_interval",
    "evaluation.every": "eval_every eval_steps eval_interval",
    "model.num_layers": "n_layer n_layers num_hidden_layers depth",
    "model.width": "hidden_size hidden_dim d_model n_embd embed_dim dim",
    "model.num_heads": "n_head n_heads num_attention_heads",
    "model.feed_forward_width": "intermediate_size ffn_hidden_size ffn_dim mlp_dim d_ff",
    "model.rotary_fraction": "rotary_pct partial_rotary_factor",
    "lora.rank": "lora_r lora_rank r",
    "lora.alpha": "lora_alpha",
    "lora.targets": "target_modules lora_target_modules",
    "parallel.model": "tp tensor_parallel tensor_parallel_size tensor_model_parallel_size",
}


class ConfigError(ValueError):
    """A config that cannot run. Its text is one line: the key, its value, why, and what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def get(config: ConfigDict, key: str) -> Any:
    """The value at a dotted key."""
    for name in key.split("."):
        config = config[name]
    return config.to_dict() if isinstance(config, ConfigDict) else config


def field_type(config: ConfigDict, key: str) -> type:
    """The type of the field at a dotted key, also where it is unset; `ConfigError` if unknown."""
    *groups, name = key.split(".")
    try:
        for group in groups:
            config = config[group]
        return config.get_type(name)
    except (KeyError, AttributeError, TypeError):
        raise unknown_key(key) from None


def unknown_key(key: str) -> ConfigError:
    """The error for a key that is not in the tree; names the nearest one."""
    remedy = f"did you mean config.{nearest(key)}?"
    if key.startswith("data.weights."):
        remedy = "name a new source in the config file, or after it: configs/own_text.py:mine=1"
    return ConfigError(f"config.{key}: there is no such field; {remedy}")


def nearest(key: str) -> str:
    """The key that other software calls so; else the one most like it or its last part."""
    name = key.split(".")[-1]
    for ours, theirs in _ELSEWHERE.items():
        if name in theirs.split():
            return ours

    def likeness(other: str) -> float:
        whole = difflib.SequenceMatcher(None, key, other).ratio()
        last = difflib.SequenceMatcher(None, name, other.split(".")[-1]).ratio()
        return max(whole, last) + 0.1 * whole

    return max(FIELDS, key=likeness)


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Nested plain dict that JSON can hold: tuples as lists, unset fields as None."""
    return json.loads(json.dumps(config.to_dict()))


def from_dict(tree: Mapping[str, Any]) -> ConfigDict:
    """The inverse of `to_dict`. What `tree`, of another version, lacks has its default.

    What is not known here is left out.
    """
    config = default_config()
    for key, value in flatten(tree):
        if key in FIELDS or key.startswith("data.weights."):
            set_value(config, key, value)
    return config


def set_value(config: ConfigDict, key: str, value: Any) -> None:
    """Sets the field at a dotted key; `ConfigError` for an unknown key or a wrong type."""
    *groups, name = key.split(".")
    try:
        group = config
        for part in groups:
            group = group[part]
        group[name] = tuple(value) if isinstance(value, list) else value
    except (KeyError, AttributeError):
        raise unknown_key(key) from None
    except TypeError:
        why = f"is of type {type(value).__name__}"
        remedy = f"give a value of type {field_type(config, key).__name__}"
        raise ConfigError(f"config.{key}={value!r}: {why}; {remedy}") from None


def set_by(config: ConfigDict, overrides: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> 'command line' | 'file' | 'default' (also where a file repeats the default)."""
    defaults = dict(flatten(default_config()))
    origins = {}
    for key, value in flatten(config):
        origins[key] = "default" if key in defaults and defaults[key] == value else "file"
        if within(key, overrides):
            origins[key] = "command line"
    return origins


def refuse(config: ConfigDict, key: str, problem: str) -> NoReturn:
    """Raises the `ConfigError` of one field. `problem`: "why; remedy"."""
    value = get(config, key)
    raise ConfigError(f"config.{key}={'not set' if value is None else repr(value)}: {problem}")


def config_changes(saved: Mapping[str, Any], config: ConfigDict) -> dict[str, list[Any]]:
    """{key: [was, now]} of the fields that differ and change what a step computes.

    `saved`: the config in a checkpoint's item `run`.
    """
    skipped = (*HARMLESS, *ROUNDING, *IDENTITY, "data.tokenizer")
    return {k: v for k, v in _differing(saved, config).items() if not within(k, skipped)}


def rounding_changes(saved: Mapping[str, Any], config: ConfigDict) -> list[str]:
    """The differing fields after which losses stay equal up to rounding only."""
    return [key for key in _differing(saved, config) if within(key, ROUNDING)]


def show_changes(found: Mapping[str, Any]) -> str:
    """What `config_changes` or `differing` found, in one line."""
    return "; ".join(f"config.{key} was {was!r}, now {now!r}" for key, (was, now) in found.items())


def differing(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """{key: [was, now]} of what differs; None for what is not there."""
    keys = sorted(was.keys() | now.keys())
    return {key: [was.get(key), now.get(key)] for key in keys if was.get(key) != now.get(key)}


def _differing(saved: Mapping[str, Any], config: ConfigDict) -> dict[str, list[Any]]:
    """A field that `saved` lacks is newer, and had its default."""
    defaults = dict(flatten(to_dict(default_config())))
    del defaults["data.weights"]
    return differing(defaults | dict(flatten(saved)), dict(flatten(to_dict(config))))


def within(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of these, or in a group that is."""
    return any(key == name or key.startswith(name + ".") for name in names)
