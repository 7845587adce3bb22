"""What keeps a run alive around its steps. `start_services` has them in the order of entering."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict
from rich.console import Console

from stablelm_jax import config as config_lib
from stablelm_jax.checkpoint.names import checkpoint_name
from stablelm_jax.checkpoint.saving import Saver
from stablelm_jax.checkpoint.store import CheckpointStore
from stablelm_jax.parallel import distributed
from stablelm_jax.run import notices
from stablelm_jax.run.compilation_cache import CompilationCache
from stablelm_jax.run.events import Events
from stablelm_jax.run.folder import RunFolder
from stablelm_jax.run.log import RunLog
from stablelm_jax.run.profile import Profiler
from stablelm_jax.run.signals import EXIT_STOPPED, StopRequest
from stablelm_jax.run.watchdog import Watchdog, write_stacks
from stablelm_jax.run.writers import Writers

HANG_PAUSE = 5.0  # seconds in which the other processes write their stacks


@dataclasses.dataclass(frozen=True)
class Services:
    """The services of one start of a run; each file names the one it is about."""

    stop: StopRequest
    console: Console
    cache: CompilationCache
    folder: RunFolder
    events: Events
    store: CheckpointStore
    saver: Saver
    log: RunLog
    profiler: Profiler
    watchdog: Watchdog

    def note_what_is_safe(self) -> None:
        """Tells `stop` what to say of the run where a signal ends it at once."""
        saved = self.store.steps()
        if saved:
            path = self.folder.checkpoints / checkpoint_name(saved[-1])
            self.stop.safe = f"checkpoint {path} is whole"


@contextlib.contextmanager
def start_services(config: ConfigDict, workdir: str, stop: StopRequest) -> Iterator[Services]:
    """Enters the services of the run in the folder `workdir`; they are left in reverse order.

    `stop` listens to signals already.

    Raises:
      ValueError: the folder cannot be used, or a service that the config asks for is missing.
    """
    with contextlib.ExitStack() as stack:
        # jax takes SIGTERM for itself where several processes meet: it is taken back.
        stop.listen()
        # Google's notice that this machine is about to go asks for what a signal asks for.
        notices.watch(stop.hear)
        console = Console(quiet=not distributed.is_first())
        # Before anything is compiled.
        cache = CompilationCache(workdir)
        # From here on a signal leaves something to bring to its end first, but in the phases that
        # say that they may be left.
        stack.enter_context(stop.phase(stop.phase_name))
        # Nobody else writes to the folder from here on. It uploads once more when it is left, and
        # so is left after all that writes into it.
        folder = RunFolder(workdir)
        stack.enter_context(_claimed(folder))
        console.print(f"run folder: {folder}", soft_wrap=True)
        events = Events(console, folder.events if distributed.is_first() else None)
        # Opening the store removes what an interrupted save has left: not before the folder is
        # ours. Closing waits until a save that is under way is whole, after an error too.
        store = CheckpointStore(
            folder.checkpoints,
            keep_latest=config.checkpoint.keep_latest,
            keep_every=config.checkpoint.keep_every,
            first_process=distributed.is_first(),
        )
        saver = stack.enter_context(contextlib.closing(Saver(config.checkpoint, store, events)))
        writers = stack.enter_context(contextlib.closing(Writers(config, folder)))
        log = RunLog(folder, events, writers)
        profiler = Profiler(config_lib.profiled_steps(config), folder.path / "profile", console)
        # The watchdog looks on while steps are taken; what ends the run has bounds of its own.
        watchdog = Watchdog(
            config.training.hang_seconds,
            lambda why: _report_hang(why, watchdog.step_number, stop, folder, events),
        )
        stack.callback(watchdog.stop)
        services = Services(
            stop, console, cache, folder, events, store, saver, log, profiler, watchdog
        )
        services.note_what_is_safe()
        yield services


@contextlib.contextmanager
def _claimed(folder: RunFolder) -> Iterator[None]:
    """The folder, made and held by process 0; nobody goes on without it."""
    with contextlib.ExitStack() as stack:
        error = None
        if distributed.is_first():
            try:
                stack.enter_context(folder.claimed())
            except (ValueError, OSError) as caught:
                error = caught
        if distributed.agreed(error is not None):
            raise error or ValueError("process 0 could not take the run folder; see its output")
        yield


def _report_hang(why: str, step: int, stop: StopRequest, folder: RunFolder, events: Events) -> None:
    """Ends the process from the watchdog's thread: no other may be able to do anything."""
    # Even where the console or the disk is what hangs.
    threading.Timer(4 * HANG_PAUSE, os._exit, (EXIT_STOPPED,)).start()
    index = jax.process_index()
    path = folder.path / "hang" / f"{checkpoint_name(step)}-process{index}.txt"
    text = f"HUNG in {stop.phase_name} at step {step} on process {index}: {why}"
    write_stacks(path, text)
    folder.upload_file(path)
    events.tell("hang", f"{text}; see {path}", style="bold red", step=step)
    if index == 0:
        time.sleep(HANG_PAUSE)  # jax ends the others as soon as process 0 is gone
    os._exit(EXIT_STOPPED)
