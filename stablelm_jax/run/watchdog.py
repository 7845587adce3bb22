"""Notices that a run hangs: nothing has moved for many times the length of a step.

Steps are dispatched ahead of the devices, so the loop's own pace says nothing. The watchdog is
handed an array of each step, and its thread sees, without waiting, when the device has made it.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from stablelm_jax.checkpoint.names import checkpoint_name
from stablelm_jax.run.backstop import Backstop
from stablelm_jax.run.events import Events
from stablelm_jax.run.folder import RunFolder
from stablelm_jax.run.signals import EXIT_STOPPED, StopRequest

_FACTOR = 10.0  # times the median step
_PAUSE = 5.0  # seconds in which the other processes write their stacks
BACKSTOP_SECONDS = 5 * _PAUSE  # more than the limit: the watchdog itself ends the run sooner


class Watchdog:
    """Between `start` and `stop`, calls `hung` once when nothing moves for `limit()` seconds.

    `hung` gets the last step that was dispatched and a sentence, in the watchdog's thread.
    """

    def __init__(
        self,
        least_seconds: float,
        hung: Callable[[int, str], None],
        backstop: Callable[[], Backstop] | None = None,
    ):
        """`least_seconds`: the limit is never below this; 0 switches the watchdog off.

        `backstop`: makes what ends the process where the watchdog's own thread cannot run.
        """
        self._least, self._hung, self._bound = least_seconds, hung, 0.0
        self._steps: collections.deque[Any] = collections.deque()
        self._seconds: collections.deque[float] = collections.deque(maxlen=101)
        self._ended = threading.Event()
        self._make_backstop = backstop
        self._poll = min(1.0, least_seconds / 10)

    def start(self, step_number: int) -> None:
        """From now on something must move."""
        self._step_number = step_number
        self.moved()
        if self._least > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Ends the watch."""
        self._ended.set()

    def moved(self) -> None:
        """Notes that something other than a step went on, as a batch of an evaluation."""
        self._moved_at = time.monotonic()

    def step(self, step_number: int, result: Any) -> None:
        """Notes a dispatched step; `result` is one of its arrays, which nobody donates."""
        self._step_number = step_number
        self._steps.append(result)

    @contextlib.contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """Raises the limit to `seconds` while something runs that has a time limit of its own."""
        self._bound = seconds
        try:
            yield
        finally:
            self.moved()
            self._bound = 0.0

    def limit(self) -> float:
        """The seconds without any move that mean a hang."""
        median = statistics.median(self._seconds) if self._seconds else 0.0
        return max(_FACTOR * median, self._least, self._bound)

    def _watch(self) -> None:
        backstop = None
        with contextlib.suppress(OSError):  # the watchdog serves without it
            backstop = self._make_backstop and self._make_backstop()
        looked_at = time.monotonic()
        while not self._ended.wait(self._poll):
            if backstop:
                backstop.set(self.limit() + BACKSTOP_SECONDS)
            now = time.monotonic()
            if now - looked_at > 5 * self._poll + 1:  # the whole process was halted, and goes on
                self._moved_at += now - looked_at
            looked_at = now
            finished = 0
            while self._steps and self._steps[0].is_ready():
                self._steps.popleft()
                finished += 1
            if finished:
                self._seconds.extend([(now - self._moved_at) / finished] * finished)
                self._moved_at = now
            if now - self._moved_at > self.limit():
                why = f"nothing moved for {now - self._moved_at:.0f} s"
                limit = f"{_FACTOR:g} median steps, at least {self._least:g} s"
                self._hung(self._step_number, f"{why} (limit: {limit})")
                break
        if backstop:
            backstop.stop()


def watchdog_of(
    least_seconds: float, stop: StopRequest, folder: RunFolder, events: Events
) -> Watchdog:
    """The watchdog of a run, which ends it where it hangs, and C behind it."""
    path = folder.path / "hang" / f"native-process{jax.process_index()}.txt"
    text = f"HUNG: native code lets no Python run on process {jax.process_index()}; see {path}"
    return Watchdog(
        least_seconds,
        lambda step, why: _end_hung_run(step, why, stop, folder, events),
        lambda: Backstop(path, text, EXIT_STOPPED),
    )


def _end_hung_run(
    step: int, why: str, stop: StopRequest, folder: RunFolder, events: Events
) -> None:
    """Writes the stacks of all threads and ends the process: no thread may be able to go on."""
    # Even where the console or the disk is what hangs.
    threading.Timer(4 * _PAUSE, os._exit, (EXIT_STOPPED,)).start()
    index = jax.process_index()
    path = folder.path / "hang" / f"{checkpoint_name(step)}-process{index}.txt"
    text = f"HUNG in {stop.phase_name} at step {step} on process {index}: {why}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        print(text, end="\n\n", file=file, flush=True)
        faulthandler.dump_traceback(file=file, all_threads=True)
    with contextlib.suppress(Exception):  # the network may be what hangs: one try
        if folder.mirror:
            folder.mirror.upload_file(path)
    events.tell("hang", f"{text}; see {path}", style="bold red", step=step)
    if jax.process_count() > 1:
        time.sleep(_PAUSE)  # the others leave as soon as they hear of this one
    stop.leave(EXIT_STOPPED)
