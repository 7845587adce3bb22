"""When a run saves, and what becomes of a save that fails: the run goes on, loudly.

A checkpoint `global_step<N>` has three items: `params` (float32, a plain nested dict under the
names of the parameter table; of LoRA the adapters alone), `optimizer` (its state under the same
names: AdamW's `m`, `v` and `count`) and `run` (JSON: all else that is needed to go on, to evaluate
or to convert). Nothing in it depends on classes of flax or optax, on the mesh or on the number of
hosts.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals, Future

from stablelm_jax.checkpoint.barrier import FailedElsewhere, SaveBarrier
from stablelm_jax.checkpoint.checksum import fetch_checksums, start_checksums
from stablelm_jax.checkpoint.names import checkpoint_name
from stablelm_jax.checkpoint.reading import FORMAT_VERSION, sealed
from stablelm_jax.checkpoint.store import CheckpointStore
from stablelm_jax.parallel import distributed
from stablelm_jax.storage.remote import described

RETRY_SECONDS = 60.0  # from a save that failed to the next try
# Bytes that are read at once: memory for them is used again and again, where that for whole leaves
# would come from the system anew (glibc: from 32 MiB on), which takes longer than reading them.
_CHUNK = 2**24
SLOW_SECONDS = 10.0  # a wait for a save that is longer than this is told


class SaveFailed(ValueError):
    """The last checkpoint of a run could not be written."""


# The items `params` and `optimizer` as trees of arrays, and the item `run` as plain JSON values.
# Without an optimizer a checkpoint holds weights alone: enough for all but to go on.
Content = tuple[dict[str, Any], dict[str, Any]]


class Saver:
    """Saves the checkpoints of a run, one at a time. Every process calls every method alike.

        idle -- save --> writing -- all is written --> idle
                            |
                            +-- it fails: told, removed --> waiting -- 60 s, or save --> writing

    `look` and `due_by_time` are asked at every step and never wait.
    """

    def __init__(self, config: Any, store: CheckpointStore, events: Any, pages: str = ""):
        """`config`: the group `checkpoint`. `pages`: the file with all that Orbax says."""
        self._config, self._store, self._events, self._pages = config, store, events, pages
        self._barrier = SaveBarrier()
        options = ocp.AsyncOptions(config.timeout_seconds, barrier_sync_fn=self._barrier)
        self._writer = ocp.AsyncCheckpointer(_handlers(), async_options=options)
        self._writing = False
        self._began_at = time.monotonic()  # the newest save, or this start of the run
        self._retry_at: float | None = None
        self.last_step = -1  # of the newest save that was started; -1 before the first

    def due_by_time(self) -> bool:
        """Whether a temporary checkpoint, or another try, is due by this process's clock."""
        now = time.monotonic()
        if self._retry_at is not None:
            return now >= self._retry_at
        minutes = self._config.every_minutes
        return minutes > 0 and now - self._began_at >= 60 * minutes

    def look(self) -> None:
        """Notices that the save under way has come to its end, well or not."""
        if self._writing and self._has_ended():
            self._settle()
        elif self._writing:
            _leave_cores_to_steps()

    def save(self, step: int, make: Callable[[], Content]) -> None:
        """Starts to save a step that is due, unless it is saved; a failure is told, not raised.

        The arrays are free for donation on return. It waits for the save before it, which takes
        `checkpoint.timeout_seconds` at most, since others may branch from the steps that the
        config names: none of them is left out.
        """
        told = False
        while self._writing and not self._has_ended():
            seconds = time.monotonic() - self._began_at
            if seconds > SLOW_SECONDS and not told:
                told = True
                text = (
                    f"{checkpoint_name(self.last_step)} is still being written, for {seconds:.0f} "
                    f"s; the training waits for it before it saves {checkpoint_name(step)}"
                )
                self._events.tell("slow_save", text, step=step)
            time.sleep(0.01)
        self._settle()
        if step not in self._store.steps():
            self._start(step, make)

    def finish(self, step: int, make: Callable[[], Content]) -> None:
        """Returns when `global_step<step>` is whole; SaveFailed if two tries could not write it."""
        self._settle()
        for _ in range(2):
            if step not in self._store.steps():
                self._start(step, make)
                self._settle()
        kept = self._store.steps()
        if step not in kept:
            raise SaveFailed(
                f"{self._store.folder / checkpoint_name(step)} could not be written (see above); "
                "free the disk and run the same command again: it goes on "
                + (f"from {checkpoint_name(kept[-1])}" if kept else "from the beginning")
            )

    def close(self) -> None:
        """Waits for the save under way and releases the threads; never raises."""
        self._settle()
        with contextlib.suppress(Exception):  # it was told above
            self._writer.close()

    def _start(self, step: int, make: Callable[[], Content]) -> None:
        self.last_step, self._began_at, self._retry_at = step, time.monotonic(), None
        self._barrier.begin()
        content = make()
        try:
            start_writing(self._writer, self._store.folder / checkpoint_name(step), *content)
        except Exception as error:  # from the disk, the network or the store's driver
            self._fail(error)
            return
        self._writing = True
        if not self._config.asynchronous:
            self._settle()

    def _has_ended(self) -> bool:
        thread = self._writer._async_manager._thread  # Orbax has no public way to ask
        return thread is None or not thread.is_alive()

    def _settle(self) -> None:
        """Waits for the save under way, if there is one: the checkpoint is whole, or has failed."""
        if not self._writing:
            return
        try:
            self._writer.wait_until_finished()
        except Exception as error:
            self._fail(error)
            return
        self._writing = False
        self._store.add(self.last_step)

    def _fail(self, error: Exception) -> None:
        self._writing, self._retry_at = False, time.monotonic() + RETRY_SECONDS
        # What the system said stands somewhere in the pages that tensorstore says.
        found = re.search(r"os_error_code='(\d+)'", str(error))
        cause = os.strerror(int(found[1])) if found else described(error)
        if isinstance(error, FailedElsewhere):
            cause = str(error)
        else:
            self._barrier.fail(cause)
        with contextlib.suppress(Exception):  # what is left is removed by the next start
            self._store.remove_unfinished(self.last_step)
        kept = self._store.steps()
        older = f"{checkpoint_name(kept[-1])} is whole" if kept else "there is no older one"
        more = f"; {self._pages} has more" if self._pages else ""
        text = (
            f"{checkpoint_name(self.last_step)} COULD NOT BE SAVED ({cause}); the run goes on, "
            f"{older}, and another try follows within {RETRY_SECONDS:.0f} s. Look at the disk of "
            f"{self._store.folder}{more}"
        )
        self._events.tell("save_failed", text, style="bold red", step=self.last_step)


def write_checkpoint(path: epath.PathLike, arrays: dict[str, Any], run: dict[str, Any]) -> None:
    """One checkpoint outside a run, whole on return. `path`: named global_step<N>."""
    with ocp.AsyncCheckpointer(_handlers()) as writer:  # which waits as it is closed
        start_writing(writer, epath.Path(path).resolve(), arrays, run)


def start_writing(
    writer: ocp.AsyncCheckpointer, path: epath.Path, arrays: dict[str, Any], run: dict[str, Any]
) -> None:
    """Gives Orbax the items of a checkpoint; every leaf's checksum is under way on return."""
    chunks, sums = ocp.SaveArgs(chunk_byte_size=_CHUNK), concurrent.futures.Future()
    items = {
        name: ocp.args.PyTreeSave(tree, save_args=jax.tree.map(lambda _: chunks, tree))
        for name, tree in arrays.items()
    }
    try:
        try:
            writer.save(path, args=ocp.args.Composite(**items, run=_RunSave(run, sums)))
        finally:
            # After Orbax's own part, whose threads would else wait for the cores that sum; and
            # where that failed, too, since all processes run the same programs in the same order.
            sums.set_result(start_checksums(arrays))
    finally:
        sums.cancel()  # where it has no result: nobody shall wait for one


def _handlers() -> ocp.CompositeCheckpointHandler:
    # Compressed, float32 loses 7 % of its bytes and saving takes three times as long.
    arrays = ("params", "optimizer")
    handlers = {name: ocp.PyTreeCheckpointHandler(use_compression=False) for name in arrays}
    return ocp.CompositeCheckpointHandler(**handlers, run=_RunHandler())


def _leave_cores_to_steps() -> None:
    """Has tensorstore's threads run where nothing else would, for as long as they live; on Linux.

    They copy into the page cache, as fast as they are let: of two cores they took one. On a host
    whose devices compute elsewhere there are idle cores, and nothing changes.
    """
    for task in os.listdir("/proc/self/task") if os.path.exists("/proc/self/task") else ():
        with contextlib.suppress(OSError):  # a thread that has just ended
            with open(f"/proc/self/task/{task}/comm", "rb") as name:
                if name.read().startswith(b"ts_pool"):
                    os.sched_setscheduler(int(task), os.SCHED_IDLE, os.sched_param(0))


class _RunHandler(ocp.JsonCheckpointHandler):
    """Writes the item `run`, with the checksums, which only its own thread waits for."""

    async def async_save(self, directory: epath.Path, args: _RunSave) -> list[Future]:
        return [CommitFutureAwaitingContractedSignals(self._write(directory, args), name="run")]

    async def _write(self, directory: epath.Path, args: _RunSave) -> None:
        sums = fetch_checksums(args.sums.result())
        if distributed.is_first():
            record = {"format_version": FORMAT_VERSION, **args.run, "checksums": sums}
            (directory / "metadata").write_text(json.dumps(sealed(record)), "utf-8")


@ocp.args.register_with_handler(_RunHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _RunSave(ocp.args.CheckpointArgs):
    """The item `run` but for its checksums, and what `start_checksums` will give."""

    run: dict[str, Any]
    sums: concurrent.futures.Future
