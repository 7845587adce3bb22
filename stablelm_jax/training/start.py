"""What a run begins with: its newest whole checkpoint, its parent's, or fresh weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from stablelm_jax.checkpoint.names import checkpoint_name
from stablelm_jax.checkpoint.reading import (
    CheckpointError,
    DamagedCheckpoint,
    read_arrays,
    read_run,
    state_hash,
)
from stablelm_jax.checkpoint.store import CheckpointStore
from stablelm_jax.parallel import distributed, sharding
from stablelm_jax.run.events import Events
from stablelm_jax.training.data_position import DataPosition, NoCheckpoint, check_parent
from stablelm_jax.training.resume import (
    Position,
    ResumeError,
    check_changes,
    check_same_run,
    config_changes,
    from_arrays,
    given,
    rounding_changes,
    to_checkpoint,
)
from stablelm_jax.training.setup import Run, prepare_run
from stablelm_jax.training.state import TrainState, init_state, new_guard

_ROW = ("in_a_row", "before_row")  # of `LossSums.state()`
_MOVES_ORIGIN = ("data.weights", "data.stages", "data.batch_size")


@dataclasses.dataclass(frozen=True)
class ResumeOptions:
    """How a run is to be resumed.

    Attributes:
      strict: a damaged newest checkpoint is an error; else the newest whole one is taken.
      accept_config_change: a config that differs in more than harmless fields is taken.
    """

    strict: bool = False
    accept_config_change: bool = False


def prepare_start(config: ConfigDict, workdir: str) -> Run:
    """`prepare_run`, with the origin that the newest readable checkpoint of the folder tells.

    Raises:
      ValueError: config, data and origin do not fit.
    """
    check_parent(config)
    try:
        origin = DataPosition.of_workdir(workdir)
    except NoCheckpoint:
        origin = DataPosition.of_config(config)
    return prepare_run(config, origin)


class Start:
    """Finds what a run begins with.

    Attributes:
      run: as prepared, or prepared anew where the checkpoint asks for another origin.
      state, position: where it begins.
      resumed: whether from a checkpoint of its own.
    """

    def __init__(self, run: Run, store: CheckpointStore, wishes: ResumeOptions, events: Events):
        """Raises ResumeError, CheckpointError or ValueError; nothing of the run is changed then.

        Damaged checkpoints newer than the one that was taken are set aside under another name.
        """
        self.run, self._store, self._wishes, self._events = run, store, wishes, events
        self.resumed = False
        for name in store.unfinished:
            events.tell("unfinished_checkpoint", f"{name} was never finished; removed", name=name)
        store.agree(distributed.agreed_numbers(store.steps()))
        damaged: dict[int, CheckpointError] = {}
        for step in reversed(store.steps()):
            found = self._resumed(step, damaged)
            if found is not None:
                self.state, self.position = found
                self.resumed = True
                break
        else:
            if damaged:
                named = "; ".join(map(str, damaged.values()))
                raise CheckpointError(
                    f"no checkpoint in {store.folder} can be read: {named}. Give one of them back, "
                    "or move them all away to begin anew"
                )
            self.state, self.position = self._begun()
        self._set_aside(damaged)
        last = self.run.config.training.num_steps
        if self.position.step > last:
            raise ResumeError(
                f"config.training.num_steps={last}, but {store.folder} has step "
                f"{self.position.step} already: give more steps, or another --workdir"
            )

    def _resumed(
        self, step: int, damaged: dict[int, CheckpointError]
    ) -> tuple[TrainState, Position] | None:
        """From the checkpoint of a step; None where it is damaged, and then noted."""
        path = self._store.folder / checkpoint_name(step)
        error, found = None, None
        try:
            found = self._restored(path)
        except DamagedCheckpoint as caught:
            error = caught
        if not distributed.anywhere(error is not None):
            self._events.print(f"resuming from {path}")
            return found
        error = error or DamagedCheckpoint(f"{path} is damaged on another host")
        if self._wishes.strict:
            raise CheckpointError(
                f"{error} (--strict: without it the run goes on from the newest whole one)"
            )
        damaged[step] = error
        return None

    def _set_aside(self, damaged: Mapping[int, CheckpointError]) -> None:
        """Not before another one could be read: it may be the disk, or this host."""
        for step, error in damaged.items():
            aside = self._store.set_aside(step)
            self._events.tell(
                "damaged_checkpoint",
                f"{error}; it is now called {aside}, and the run goes on from the newest whole one",
                checkpoint=str(self._store.folder / checkpoint_name(step)),
            )

    def _restored(self, path: Any) -> tuple[TrainState, Position]:
        saved = read_run(path)
        config = self.run.config
        changes = config_changes(saved, config)
        check_changes(changes, self._wishes.accept_config_change, path)
        origin = DataPosition.of_checkpoint(saved)
        if any(key.startswith(_MOVES_ORIGIN) for key in changes) and not _goes_on(
            config, origin, saved
        ):
            origin = origin.moved(saved)
        if origin != self.run.origin:
            self.run = prepare_run(config, origin)
        check_same_run(saved, self.run.identity())
        state, position = restore(self.run, path, saved)
        if origin != DataPosition.of_checkpoint(saved):
            state, position = _without_row(state, position)
        if changes:
            position.config_changes.append({"step": position.step, "changes": changes})
            shown = "; ".join(f"{key}: {was!r} -> {now!r}" for key, (was, now) in changes.items())
            self._events.tell(
                "config_changed", f"config changed at step {position.step}: {shown}", **changes
            )
        rounding = rounding_changes(saved, config)
        if rounding:
            self._events.print(
                f"{', '.join(rounding)} changed: losses go on to rounding, not bit for bit"
            )
        return state, position

    def _begun(self) -> tuple[TrainState, Position]:
        """A run without a checkpoint of its own."""
        run = self.run
        if not run.origin.parent:
            self._events.print("starting from fresh weights")
            return init_state(run.model, run.optimizer, run.abstract, run.config.seed), Position()
        saved = read_run(run.origin.parent)
        if state_hash(saved["checksums"]) != run.origin.parent_hash:
            raise CheckpointError(f"{run.origin.parent} changed while it was read; start again")
        check_same_run(saved, run.identity())
        state, position = restore(run, run.origin.parent, saved)
        self._events.tell(
            "branch",
            f"a branch of {run.origin.parent}, from step {position.step}",
            parent=run.origin.parent,
            step=position.step,
            hash=run.origin.parent_hash,
        )
        state, position = _without_row(state, position)
        return state, dataclasses.replace(position, train_seconds=0.0, config_changes=[])


def _goes_on(config: ConfigDict, origin: DataPosition, saved: Mapping[str, Any]) -> bool:
    """Whether rows are counted as before and only weights of later steps are new."""
    rows, batch_size = saved["rows_consumed"], saved["config"]["data"]["batch_size"]
    spans = [list(span) for span in origin.mixture(config).spans()]
    return config.data.batch_size == batch_size and given(spans, rows) == given(
        saved["row_order"]["stages"], rows
    )


def _without_row(state: TrainState, position: Position) -> tuple[TrainState, Position]:
    """Forgets updates left out in a row, which would lead back before a run's own first step."""
    sums = {k: v for k, v in (position.loss_sums or {}).items() if k not in _ROW}
    zeros = {name: jnp.zeros_like(state.guard[name]) for name in ("in_a_row", "held")}
    guard = jax.device_put(state.guard | zeros, jax.tree.leaves(state.guard)[0].sharding)
    return (
        dataclasses.replace(state, guard=guard),
        dataclasses.replace(position, loss_sums=sums or None),
    )


def restore(run: Run, path: Any, saved: Mapping[str, Any]) -> tuple[TrainState, Position]:
    """State and position of the checkpoint at `path`, placed on this run's mesh.

    Raises:
      DamagedCheckpoint: its arrays are not what `saved`, its item `run`, says.
    """
    wanted = to_checkpoint(run.abstract, {})
    arrays = read_arrays(path, {"params": wanted.params, "optimizer": wanted.optimizer}, saved)
    place = sharding.replicated(run.mesh)
    guard = {name: jnp.float32(saved.get("guard", {}).get(name, 0.0)) for name in new_guard()}
    step, guard = jax.device_put((jnp.int32(saved["step"]), guard), place)
    blank = TrainState(step, step, None, run.abstract.opt_state, guard)
    state = from_arrays(blank, arrays)
    keys = ("step", "rows_consumed", "train_seconds", "loss_sums")
    position = Position(**{key: saved[key] for key in keys})
    position.config_changes = list(saved.get("config_changes", []))
    return state, position
