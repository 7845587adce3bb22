"""What a run begins with: its newest whole checkpoint, its parent's, or fresh weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from stablelm_jax.checkpoint.names import branch_name
from stablelm_jax.checkpoint.reading import (
    CheckpointError,
    DamagedCheckpoint,
    read_arrays,
    read_run,
    state_hash,
)
from stablelm_jax.checkpoint.store import CheckpointStore
from stablelm_jax.parallel import distributed, sharding
from stablelm_jax.training.events import Events
from stablelm_jax.training.origin import NoCheckpoint, Origin, check_parent
from stablelm_jax.training.resume import (
    Position,
    check_changes,
    check_same_run,
    config_changes,
    from_arrays,
    rounding_changes,
    to_checkpoint,
)
from stablelm_jax.training.setup import Run, prepare_run
from stablelm_jax.training.state import TrainState, init_state, new_guard

_MOVES_ORIGIN = ("data.weights", "data.stages", "data.batch_size")


@dataclasses.dataclass(frozen=True)
class Wishes:
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
        origin = Origin.of_workdir(workdir)
    except NoCheckpoint:
        origin = Origin.of_config(config)
    return prepare_run(config, origin)


class Start:
    """Finds what a run begins with.

    Attributes:
      run: as prepared, or prepared anew where the checkpoint asks for another origin.
      state, position: where it begins.
      resumed: whether from a checkpoint of its own.
    """

    def __init__(self, run: Run, store: CheckpointStore, wishes: Wishes, events: Events):
        """Raises ResumeError, CheckpointError or ValueError; nothing of the run is changed then.

        Damaged checkpoints are set aside under another name.
        """
        self.run, self._store, self._wishes, self._events = run, store, wishes, events
        self.resumed, self._set_aside = False, []
        for name in store.unfinished:
            events.tell("unfinished_checkpoint", f"{name} was never finished; removed", name=name)
        store.agree(distributed.agreed_numbers(store.steps()))
        for step in reversed(store.steps()):
            found = self._resumed(step)
            if found is not None:
                self.state, self.position = found
                self.resumed = True
                return
        if self._set_aside:
            raise CheckpointError(
                f"every checkpoint in {store.folder} is damaged; they are now called "
                f"{', '.join(self._set_aside)}. Run the same command once more to begin anew, or "
                "restore one of them under its old name"
            )
        self.state, self.position = self._begun()

    def _resumed(self, step: int) -> tuple[TrainState, Position] | None:
        """From the checkpoint of a step; None where it is damaged, and then set aside."""
        path = self._store.folder / branch_name(step)
        error, found = None, None
        try:
            found = self._restored(path)
        except DamagedCheckpoint as caught:
            error = caught
        if not distributed.anywhere(error is not None):
            self._events.print(f"resuming from {path}")
            return found
        if self._wishes.strict:
            raise CheckpointError(
                f"{error or f'{path} is damaged on another host'} (--strict: without it the run "
                "goes on from the newest whole one)"
            )
        aside = self._store.set_aside(step)
        self._set_aside.append(aside)
        self._events.tell(
            "damaged_checkpoint",
            f"{error or f'{path} is damaged on another host'}; it is now called {aside}, and the "
            "run goes on from the newest whole one",
            checkpoint=str(path),
        )
        return None

    def _restored(self, path: Any) -> tuple[TrainState, Position]:
        saved = read_run(path)
        config = self.run.config
        changes = config_changes(saved, config)
        check_changes(changes, self._wishes.accept_config_change, path)
        origin = Origin.of_checkpoint(saved)
        if any(key.startswith(_MOVES_ORIGIN) for key in changes):
            origin = origin.moved(saved)
        if origin != self.run.origin:
            self.run = prepare_run(config, origin)
        check_same_run(saved, self.run.identity())
        state, position = restore(self.run, path, saved)
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
        return state, dataclasses.replace(position, train_seconds=0.0, config_changes=[])


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
