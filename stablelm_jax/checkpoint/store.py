"""Writing checkpoints, and which of them stay.

A checkpoint `global_step<N>` has three items: `params` (float32, plain nested dict under the names
of the parameter table), `optimizer` (`m`, `v` under the same names, and `count`) and `run` (JSON:
what else is needed to go on, evaluate or convert). Nothing in it depends on flax or optax classes,
on the mesh or on the number of hosts.

Orbax writes; which checkpoints stay and what becomes of a save that fails is decided here, since
Orbax's manager counts a failed save among its newest checkpoints.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from stablelm_jax.checkpoint.checksum import checksums
from stablelm_jax.checkpoint.names import (
    checkpoint_name,
    checkpoint_path,
    checkpoint_step,
    entries,
    finished_steps,
)
from stablelm_jax.checkpoint.reading import FORMAT_VERSION, sealed
from stablelm_jax.storage.remote import is_url

_TEMPORARY = ocp.path.step.TMP_DIR_SUFFIX
_COMMIT_MARK = "commit_success.txt"  # what makes a folder behind a URL a checkpoint
_DELETING = ".deleting"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What is saved: `params` and `optimizer` arrays, `run` plain JSON values."""

    params: Any
    optimizer: Any
    run: dict[str, Any]


class CheckpointStore:
    """The folder `checkpoints/` of a run. One save is under way at most.

    Every process of a run calls every method, in the same order; process 0 renames and deletes.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        keep_latest: int,
        keep_every: int | None = None,
        asynchronous: bool = True,
        timeout_seconds: int = 1800,
        first_process: bool = True,
        on_phase: Callable[[str], None] = lambda phase: None,
    ):
        """Opens (and makes) `folder`.

        Args:
          keep_latest: how many of the newest checkpoints stay.
          keep_every: checkpoints whose step is a multiple of this stay for good.
          asynchronous: whether `save` returns while files are still written.
          timeout_seconds: a save that takes longer has failed.
          first_process: whether this is the process that renames and deletes.
          on_phase: called with 'writing', 'finalising' (from a thread of Orbax) and 'written' as a
            save passes through them.
        """
        self.folder = checkpoint_path(folder)
        self._keep_latest, self._keep_every = keep_latest, keep_every
        self._asynchronous, self._first, self._on_phase = asynchronous, first_process, on_phase
        if first_process:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.unfinished = self._clean_up() if first_process else []
        self._steps = set(finished_steps(self.folder)) if first_process else set()
        self._kept: set[int] = set()
        self._saving: int | None = None
        self._began = 0.0
        self._writer = ocp.AsyncCheckpointer(_announcing(on_phase), timeout_secs=timeout_seconds)

    def _clean_up(self) -> list[str]:
        """Removes what an interrupted save or deletion left; returns the names of the saves."""
        interrupted = []
        for path in entries(self.folder):
            name = path.name.split(".")[0]
            if checkpoint_step(name) is None:
                continue
            half_written = _TEMPORARY in path.name or not (
                path.name != name or ocp.path.step.is_path_finalized(path)
            )
            if half_written:
                interrupted.append(name)
            if half_written or path.name.endswith(_DELETING):
                path.rmtree()
        return sorted(interrupted)

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, and of the one that is being written, ascending."""
        return sorted(self._steps | ({self._saving} - {None}))

    def agree(self, steps: Iterable[int]) -> None:
        """Tells the other processes which finished checkpoints process 0 has found."""
        self._steps = set(steps)

    def keep(self, step: int) -> None:
        """This step is never deleted by this store, however many newer ones there are."""
        self._kept.add(step)

    def set_aside(self, step: int, ending: str = ".damaged") -> str:
        """Gives a checkpoint another name, which it is no longer found by; returns it."""
        self.wait()
        path = self.folder / checkpoint_name(step)
        target = self.folder / f"{path.name}{ending}"
        number = 1
        while target.exists():
            number += 1
            target = self.folder / f"{path.name}{ending}{number}"
        if self._first:
            path.rename(target)
        self._steps.discard(step)
        return target.name

    def save(self, step: int, checkpoint: Checkpoint) -> None:
        """Starts to write `global_step<step>`; the arrays are free for donation on return.

        Raises:
          Exception: whatever the storage raised. Nothing of the older checkpoints is touched, and
            the step may be saved again.
        """
        self.wait()
        arrays = {"params": checkpoint.params, "optimizer": checkpoint.optimizer}
        run = sealed(
            {"format_version": FORMAT_VERSION, **checkpoint.run, "checksums": checksums(arrays)}
        )
        self._on_phase("writing")
        self._saving, self._began = step, time.monotonic()
        try:
            self._writer.save(
                self.folder / checkpoint_name(step),
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(checkpoint.params),
                    optimizer=ocp.args.PyTreeSave(checkpoint.optimizer),
                    run=ocp.args.JsonSave(run),
                ),
            )
        except Exception:
            self.abandon()
            raise
        if not self._asynchronous:
            self.wait()

    def seconds_under_way(self) -> float | None:
        """How long the present save has taken so far; None where none is under way."""
        return None if self._saving is None else time.monotonic() - self._began

    def finished(self) -> bool:
        """Whether the save under way has come to its end, well or not; never waits."""
        thread = self._writer._async_manager._thread  # Orbax has no public way to ask
        return self._saving is not None and (thread is None or not thread.is_alive())

    def wait(self) -> None:
        """Returns when what was saved is whole; then deletes what need not stay.

        Raises:
          Exception: whatever the save raised; what it wrote is removed.
        """
        if self._saving is None:
            return
        try:
            self._writer.wait_until_finished()
        except Exception:
            self.abandon()
            raise
        self._steps.add(self._saving)
        self._saving = None
        self._on_phase("written")
        self._delete_old()

    def abandon(self) -> None:
        """Forgets the save under way, which has failed here or on another host."""
        step, self._saving = self._saving, None
        if self._first and step is not None:
            whole = self.folder / checkpoint_name(step)
            for path in self.folder.glob(f"{checkpoint_name(step)}{_TEMPORARY}*"):
                _remove_half_written(path)
            if is_url(whole) and whole.exists() and not ocp.path.step.is_path_finalized(whole):
                whole.rmtree()  # there half a checkpoint has the name of a whole one

    def _delete_old(self) -> None:
        for step in to_delete(self._steps, self._keep_latest, self._keep_every):
            if step in self._kept:
                continue
            self._steps.discard(step)
            if self._first:
                try:
                    _delete(self.folder / checkpoint_name(step))
                except OSError as error:  # the new one is whole all the same
                    logging.error("%s was not deleted: %s", checkpoint_name(step), error)

    def close(self) -> None:
        """Waits and releases the threads; a failed save was raised before, or is raised now."""
        try:
            self.wait()
        finally:
            self._writer.close()


def item_handlers() -> ocp.CompositeCheckpointHandler:
    """How the items of a checkpoint are written."""
    # Compressed, float32 loses 7 % of its bytes and saving takes three times as long.
    arrays = {
        name: ocp.PyTreeCheckpointHandler(use_compression=False) for name in ("params", "optimizer")
    }
    return ocp.CompositeCheckpointHandler(**arrays, run=ocp.JsonCheckpointHandler())


def _announcing(on_phase: Callable[[str], None]) -> ocp.CompositeCheckpointHandler:
    """Tells when Orbax has written all and begins to make a checkpoint of it.

    Not a class of its own: Orbax knows the arguments of a handler by its class.
    """
    handler = item_handlers()
    finalize = handler.finalize

    def announced(directory: epath.Path) -> None:
        on_phase("finalising")
        finalize(directory)

    handler.finalize = announced
    return handler


def _remove_half_written(path: epath.Path) -> None:
    """Other threads of a save that has failed may write on for a moment.

    What is left after some tries the next start of the run removes.
    """
    for _ in range(20):
        try:
            return path.rmtree(missing_ok=True)
        except OSError:
            time.sleep(0.1)


def _delete(path: epath.Path) -> None:
    """A folder that is half deleted is no checkpoint, whenever the process ends."""
    if is_url(path):
        (path / _COMMIT_MARK).unlink(missing_ok=True)
    else:
        path = path.rename(path.with_name(path.name + _DELETING))
    path.rmtree()


def to_delete(steps: Iterable[int], keep_latest: int, keep_every: int | None) -> list[int]:
    """The steps that need not stay: neither multiples of `keep_every` nor among the newest."""
    ascending = sorted(steps)
    old = ascending[: max(len(ascending) - keep_latest, 0)]
    return [step for step in old if not keep_every or step % keep_every]
