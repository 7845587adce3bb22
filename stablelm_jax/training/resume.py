"""Between a running training and its checkpoint: what is saved, what must agree to go on."""

from __future__ import annotations

import dataclasses
from typing import Any

import optax

from stablelm_jax.checkpoint.store import Checkpoint
from stablelm_jax.training.state import TrainState


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
    """

    step: int = 0
    rows_consumed: int = 0
    train_seconds: float = 0.0
    loss_sums: dict[str, Any] | None = None


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


def check_same_run(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuses a checkpoint whose model, data or row order is not this run's.

    Args:
      saved, current: the item `run` of the checkpoint, and what this run would write.

    Raises:
      ResumeError: naming each difference.
    """
    differences = [
        f"{key} was {saved.get(key)!r}, now {current[key]!r}"
        for key in ("model_config", "tokenizer_sha256", "data_hash", "row_order")
        if saved.get(key) != current[key]
    ]
    if differences:
        raise ResumeError(
            f"the checkpoint belongs to another run: {'; '.join(differences)}; give back the "
            "settings and the data it started with, or another --workdir to start anew"
        )
