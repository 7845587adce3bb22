"""What keeps a run alive around its steps. `start_services` has them in the order of entering."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging as absl_logging
from ml_collections import ConfigDict
from rich.console import Console

from stablelm_jax import config as config_lib
from stablelm_jax.checkpoint.names import newest_finished
from stablelm_jax.checkpoint.saving import Saver
from stablelm_jax.checkpoint.store import CheckpointStore
from stablelm_jax.parallel import distributed
from stablelm_jax.run.compilation import CompilationCache
from stablelm_jax.run.console import make_console, tell_losses
from stablelm_jax.run.events import Events
from stablelm_jax.run.folder import RunFolder
from stablelm_jax.run.goodput import Goodput
from stablelm_jax.run.metrics import RunLog, Writers
from stablelm_jax.run.profile import Profiler
from stablelm_jax.run.signals import StopRequest, watch_notices
from stablelm_jax.run.watchdog import Watchdog, watchdog_of


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

    @property
    def goodput(self) -> Goodput:
        """Where the seconds go; `stop` knows the phases."""
        return self.stop.goodput


@contextlib.contextmanager
def start_services(config: ConfigDict, workdir: str, stop: StopRequest) -> Iterator[Services]:
    """Enters the services of a run; they are left in reverse order. `stop` is entered already.

    ValueError: the folder cannot be used, or a service that the config asks for is missing.
    """
    first = distributed.is_first()
    with contextlib.ExitStack() as stack:
        # jax takes SIGTERM for itself where several processes meet: it is taken back.
        stop.listen()
        # Google's notice that this machine is about to go asks for what a signal asks for.
        watch_notices(stop.hear)
        console = make_console(quiet=not first)
        # Before anything is compiled.
        cache = CompilationCache(workdir)
        # From here on a signal leaves something to bring to its end first, but in the phases that
        # say that they may be left.
        stack.enter_context(stop.phase(stop.phase_name))
        # Nobody else writes to the folder from here on. It uploads once more when it is left, and
        # so is left after all that writes into it.
        folder = RunFolder(workdir)
        stack.enter_context(folder.claimed())
        console.print(f"run folder: {folder}", soft_wrap=True)
        stack.enter_context(stop.goodput.kept_in(folder.path / "goodput.json" if first else None))
        events = Events(console, folder.path / "events.jsonl" if first else None)
        tell_losses(lambda text: events.keep("output_lost", text))
        for text in folder.moved_aside:
            events.tell("moved_aside", text)
        # Opening the store removes what an interrupted save has left: not before the folder is
        # ours. Closing waits until a save that is under way is whole, after an error too.
        store = CheckpointStore(
            folder.checkpoints,
            keep_latest=config.checkpoint.keep_latest,
            keep_every=config.checkpoint.keep_every,
            tell=events.tell,
        )
        pages = folder.path / f"orbax-process{jax.process_index()}.log"
        stack.enter_context(orbax_to_file(pages))
        saver = Saver(config.checkpoint, store, events, str(pages))
        stack.enter_context(contextlib.closing(saver))
        writers = Writers(config, folder, events)
        stack.push(lambda kind, *_: writers.close(failed=kind is not None))
        log = RunLog(folder, events, writers, stop.goodput)
        profiler = Profiler(config_lib.profiled_steps(config), folder.path / "profile", console)
        # The watchdog looks on while steps are taken; what ends the run has bounds of its own.
        watchdog = watchdog_of(config.training.hang_seconds, stop, folder, events)
        stack.callback(watchdog.stop)
        services = Services(
            stop, console, cache, folder, events, store, saver, log, profiler, watchdog
        )
        # What a process that leaves at once says, and where it says so.
        stop.whole = functools.partial(newest_finished, folder.checkpoints)
        stop.tell = lambda text: events.tell("left", text)
        yield services


@contextlib.contextmanager
def orbax_to_file(path: Path) -> Iterator[None]:
    """What Orbax says goes to a file: of a save that fails it says pages, and we say a line."""
    pages = logging.FileHandler(path, encoding="utf-8", delay=True)
    pages.handleError = lambda record: None  # the disk may be what fails
    loggers = absl_logging.get_absl_logger(), logging.getLogger("asyncio")
    print_error = sys.unraisablehook

    def is_ours(record: logging.LogRecord) -> bool:
        ours = record.name != "asyncio" and f"{os.sep}orbax{os.sep}" not in record.pathname
        if not ours:
            pages.handle(record)
        return ours

    def hook(error: Any) -> None:  # of tensorstore's threads in C++
        caught = error.exc_type, error.exc_value, error.exc_traceback
        pages.handle(logging.LogRecord("", logging.ERROR, "", 0, "in native code", (), caught))

    sys.unraisablehook = hook
    for logger in loggers:
        logger.addFilter(is_ours)
    try:
        yield
    finally:
        sys.unraisablehook = print_error
        for logger in loggers:
            logger.removeFilter(is_ours)
        with contextlib.suppress(OSError):  # the disk again
            pages.close()
