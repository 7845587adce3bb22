"""How a config differs from the one that a checkpoint was trained with, and what that means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from stablelm_jax.config.access import flatten, from_dict

# Fields that change nothing of what a step computes; a group stands for all its fields.
HARMLESS = (
    *("name", "checkpoint", "evaluation", "samples", "writers", "profile", "branch"),
    *("data.root", "data.cache", "data.cache_gb", "data.prefetch_batches", "data.check_shards"),
    *("training.num_steps", "training.log_every", "training.hang_seconds", "parallel.target"),
    *("training.check_replicas_every", "training.stop_after_skipped"),
)
# Fields that change the order in which sums are taken: the losses stay equal up to rounding.
ROUNDING = (
    *("parallel.data", "parallel.model", "parallel.replica", "parallel.zero1", "parallel.fsdp"),
    *("training.accumulation", "training.remat", "training.unroll", "training.attention"),
    *("training.cross_entropy", "training.deterministic"),
)
# Fields that a resuming run compares by what follows from them: the model's shape, the tokenizer's
# hash, the order of rows.
_CHECKED_BY_RESULT = (
    *("model", "seed", "data.tokenizer", "data.sequence_length", "data.loss_on_first_token"),
)


def config_changes(saved: Mapping[str, Any], config: ConfigDict) -> dict[str, list[Any]]:
    """{key: [was, now]} of the fields that differ and change what a step computes.

    `saved`: the config in a checkpoint's item `run`.
    """
    skipped = (*HARMLESS, *ROUNDING, *_CHECKED_BY_RESULT)
    return {k: v for k, v in _differing(saved, config).items() if not _within(k, skipped)}


def rounding_changes(saved: Mapping[str, Any], config: ConfigDict) -> list[str]:
    """The differing fields after which losses stay equal up to rounding only."""
    return [key for key in _differing(saved, config) if _within(key, ROUNDING)]


def show_changes(found: Mapping[str, Any]) -> str:
    """What `config_changes` found, in one line."""
    return "; ".join(f"config.{key} was {was!r}, now {now!r}" for key, (was, now) in found.items())


def _differing(saved: Mapping[str, Any], config: ConfigDict) -> dict[str, list[Any]]:
    was, now = dict(flatten(from_dict(saved))), dict(flatten(config))
    keys = sorted(was.keys() | now.keys())
    return {key: [was.get(key), now.get(key)] for key in keys if was.get(key) != now.get(key)}


def _within(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in names)
