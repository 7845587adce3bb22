"""When a run saves, and what becomes of a save that fails: the run goes on, loudly."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable

from ml_collections import ConfigDict

from stablelm_jax.checkpoint.names import checkpoint_name
from stablelm_jax.checkpoint.store import Checkpoint, CheckpointStore
from stablelm_jax.run.events import Events
from stablelm_jax.storage.remote import described

RETRY_SECONDS = 60.0  # after a save that failed
SLOW_SECONDS = 10.0  # after which waiting for a save is told


class SaveFailed(ValueError):
    """The last checkpoint of a run could not be written."""


class Saver:
    """Saves of a run, at most one under way. Every process calls every method alike.

    Attributes:
      last_step: of the newest save that was started; -1 before the first.
    """

    def __init__(self, config: ConfigDict, store: CheckpointStore, events: Events):
        """`config`: its group `checkpoint`."""
        self._config, self._store, self._events = config, store, events
        self._saved_at = time.monotonic()
        self._retry_at: float | None = None
        self.last_step = -1

    def due_by_time(self) -> bool:
        """Whether a temporary checkpoint, or another try, is due by this process's clock."""
        now = time.monotonic()
        if self._retry_at is not None:
            return now >= self._retry_at
        minutes = self._config.every_minutes
        return minutes > 0 and now - self._saved_at >= 60 * minutes

    def look(self) -> None:
        """Notices a save that has come to its end, well or not."""
        if self._store.finished():
            self._settle()

    def save(self, step: int, make: Callable[[], Checkpoint]) -> None:
        """Starts to save a step that is due, unless it is saved.

        Waits for the save before it, which takes `checkpoint.timeout_seconds` at most: branches
        are there at the steps that the config names.
        """
        if step in self._store.steps():
            return
        self._await_last(step)
        self._start(step, make)

    def _await_last(self, step: int) -> None:
        told = False
        while (seconds := self._store.seconds_under_way()) is not None:
            if self._store.finished():
                self._settle()
                return
            if seconds > SLOW_SECONDS and not told:
                told = True
                self._events.tell(
                    "slow_save",
                    f"{checkpoint_name(self.last_step)} is still being written, for "
                    f"{seconds:.0f} s; the training waits for it before it saves "
                    f"{checkpoint_name(step)}",
                    step=step,
                )
            time.sleep(0.01)

    def _start(self, step: int, make: Callable[[], Checkpoint]) -> None:
        self._saved_at, self._retry_at, self.last_step = time.monotonic(), None, step
        checkpoint = make()
        try:
            self._store.save(step, checkpoint)
        except Exception as error:  # of the disk, the network, the store's driver
            self._failed(error)

    def _settle(self) -> bool:
        """Waits for the save under way; returns whether it became whole."""
        try:
            self._store.wait()
        except Exception as error:
            self._failed(error)
            return False
        return True

    def _failed(self, error: Exception) -> None:
        self._retry_at = time.monotonic() + RETRY_SECONDS
        kept = self._store.steps()
        older = f"{checkpoint_name(kept[-1])} is whole" if kept else "there is no older one"
        self._events.tell(
            "save_failed",
            f"{checkpoint_name(self.last_step)} COULD NOT BE SAVED ({_cause(error)}); the run "
            f"goes on, {older}, and another try follows within {RETRY_SECONDS:.0f} s. Look at the "
            f"disk of {self._store.folder}",
            style="bold red",
            step=self.last_step,
        )

    def finish(self, step: int, make: Callable[[], Checkpoint]) -> None:
        """Returns when `global_step<step>` is whole; tries twice.

        Raises:
          SaveFailed: it could not be written. Older checkpoints are untouched.
        """
        self._settle()
        for _ in range(2):
            if step not in self._store.steps():
                self._start(step, make)
            if self._settle() and step in self._store.steps():
                return
        kept = self._store.steps()
        raise SaveFailed(
            f"{self._store.folder / checkpoint_name(step)} could not be written (see above); free "
            "the disk and run the same command again: it goes on "
            + (f"from {checkpoint_name(kept[-1])}" if kept else "from the beginning")
        )

    def close(self) -> None:
        """Waits for a save that is under way and releases the threads; never raises."""
        self._settle()
        with contextlib.suppress(Exception):  # it was told above
            self._store.close()


def _cause(error: Exception) -> str:
    """What the system said, out of pages of tensorstore's; else the beginning and end of these."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(found[1])) if found else described(error)
