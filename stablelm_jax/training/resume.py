"""Between a running training and its checkpoint: what is saved, what must agree to go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from stablelm_jax import config as config_lib
from stablelm_jax.checkpoint.saving import Checkpoint
from stablelm_jax.training.state import TrainState

# Fields that change nothing of what a step computes; a group stands for all its fields.
HARMLESS = (
    *("name", "checkpoint", "evaluation", "samples", "writers", "profile", "branch"),
    *("data.root", "data.cache", "data.cache_gb", "data.prefetch_batches", "data.check_shards"),
    *("training.num_steps", "training.log_every", "training.hang_seconds", "parallel.target"),
    *("training.check_replicas_every", "training.stop_after_skipped"),
)
# Fields that change the order of sums: the losses go on to rounding.
ROUNDING = (
    *("parallel.data", "parallel.model", "parallel.replica", "parallel.zero1", "parallel.fsdp"),
    *("training.accumulation", "training.remat", "training.unroll", "training.attention"),
    *("training.cross_entropy", "training.deterministic"),
)
# Looked at by what follows from them: the model's shape, the tokenizer's hash, the order of rows.
_ELSEWHERE = ("model", "seed", "data.tokenizer", "data.sequence_length", "data.loss_on_first_token")


class ResumeError(ValueError):
    """The checkpoint belongs to another run."""


@dataclasses.dataclass
class Position:
    """The part of a run's state that lives on the host.

    Attributes:
      step: updates done, which is also the N of the checkpoint taken now.
      rows_consumed: rows of the mixture used so far; with the data hash the whole data state.
      train_seconds: time spent in steps, over all starts of the run.
      loss_sums: `LossSums.state()` at the last save, or None.
      config_changes: what was accepted on resuming: [{"step", "changes": {key: [was, now]}}].
    """

    step: int = 0
    rows_consumed: int = 0
    train_seconds: float = 0.0
    loss_sums: dict[str, Any] | None = None
    config_changes: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def to_checkpoint(state: TrainState, run: dict[str, Any]) -> Checkpoint:
    """Plain trees: Adam's `mu` and `nu` are stored as `m` and `v` under the parameters' names."""
    get = optax.tree_utils.tree_get
    optimizer = {
        "m": get(state.opt_state, "mu"),
        "v": get(state.opt_state, "nu"),
        "count": get(state.opt_state, "count"),
        "updates_skipped": state.updates_skipped,
    }
    return Checkpoint(params=state.params, optimizer=optimizer, run=run)


def from_arrays(state: TrainState, arrays: dict[str, Any]) -> TrainState:
    """`state` with the values of the items `params` and `optimizer`; also for abstract trees."""
    saved = arrays["optimizer"]
    opt_state = optax.tree_utils.tree_set(
        state.opt_state, mu=saved["m"], nu=saved["v"], count=saved["count"]
    )
    return dataclasses.replace(
        state,
        params=arrays["params"],
        opt_state=opt_state,
        updates_skipped=saved["updates_skipped"],
    )


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuses a checkpoint whose model, data or row order is not this run's.

    Args:
      saved, current: the item `run` of the checkpoint, and what this run would write.

    Raises:
      ResumeError: naming each difference.
    """
    differences = [
        *_unequal(saved, current, ("model_config", "tokenizer_sha256")),
        *_changed_data(saved, current),
        *_changed_order(saved, current),
    ]
    if differences:
        raise ResumeError(
            f"the checkpoint belongs to another run: {'; '.join(differences)}; give back the "
            "settings and the data it started with, or another --workdir to start anew"
        )


def _unequal(saved: Mapping[str, Any], current: Mapping[str, Any], keys: Any) -> list[str]:
    return [
        f"{key} was {saved.get(key)!r}, now {current[key]!r}"
        for key in keys
        if saved.get(key) != current[key]
    ]


def _changed_data(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """By source; a source that comes later, in a new stage, is no change."""
    if "source_hashes" not in saved:
        return _unequal(saved, current, ["data_hash"])
    now = current["source_hashes"]
    return [
        f"data_hash of source {name!r} was {was[:12]}, now {now.get(name, 'missing')[:12]}"
        for name, was in saved["source_hashes"].items()
        if now.get(name) != was
    ]


def _changed_order(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """In the rows consumed so far; which weights come later is a field like others."""
    was, now = dict(saved["row_order"]), dict(current["row_order"])
    rows = saved["rows_consumed"]
    before, after = (given(order.pop("stages"), rows) for order in (was, now))
    differences = [f"row_order was {was}, now {now}"] if was != now else []
    if before != after:
        differences.append(
            f"row_order of the first {rows} rows was {before}, now {after} (rows of each source; "
            "new weights begin at a later step: config.data.stages)"
        )
    return differences


def given(stages: Any, rows: int) -> list[Any]:
    """The stages that began before a row."""
    return [[row, counts] for row, counts in stages if row < rows]


def config_changes(saved: Mapping[str, Any], config: ConfigDict) -> dict[str, list[Any]]:
    """{key: [was, now]} of the fields that differ and are not harmless."""
    was = dict(config_lib.flatten(config_lib.from_dict(saved["config"])))
    now = dict(config_lib.flatten(config))
    skipped = (*HARMLESS, *ROUNDING, *_ELSEWHERE)
    keys = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    return {key: [was.get(key), now.get(key)] for key in keys if not _within(key, skipped)}


def rounding_changes(saved: Mapping[str, Any], config: ConfigDict) -> list[str]:
    """The differing fields after which losses go on to rounding only."""
    was = dict(config_lib.flatten(config_lib.from_dict(saved["config"])))
    now = dict(config_lib.flatten(config))
    return [key for key in now if _within(key, ROUNDING) and was.get(key) != now[key]]


def _within(key: str, names: Any) -> bool:
    return any(key == name or key.startswith(name + ".") for name in names)


def check_changes(changes: Mapping[str, Any], accepted: bool, path: Any) -> None:
    """Refuses changes that nobody accepted.

    Raises:
      ResumeError: showing each.
    """
    if changes and not accepted:
        shown = "; ".join(
            f"config.{key} was {was!r}, now {now!r}" for key, (was, now) in changes.items()
        )
        raise ResumeError(
            f"the config is not the one that {path} was trained with: {shown}; give the old values "
            "back, or add --accept-config-change (it is recorded), or start a branch in another "
            f"--workdir with --config.branch.parent={path}"
        )


def guard_to_json(guard: Mapping[str, jax.Array]) -> dict[str, float]:
    """The spike guard's statistics; float32 in JSON is exact."""
    return {name: float(value) for name, value in jax.device_get(dict(guard)).items()}
