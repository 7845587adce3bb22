"""Notices that a run hangs: nothing has moved for many times the length of a step.

Steps are dispatched ahead of the devices, so the loop's own pace says nothing. The watchdog is
handed an array of each step, and its thread sees, without waiting, when the device has made it.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FACTOR = 10.0  # times the median step


class Watchdog:
    """Between `start` and `stop`, calls `hung` once when nothing moves for `limit()` seconds.

    `hung` gets a sentence; it runs in the watchdog's thread.

    Attributes:
      step_number: the last step that was dispatched.
    """

    def __init__(self, least_seconds: float, hung: Callable[[str], None]):
        """`least_seconds`: the limit is never below this; 0 switches the watchdog off."""
        self._least, self._hung, self._bound = least_seconds, hung, 0.0
        self.step_number = 0
        self._steps: collections.deque[Any] = collections.deque()
        self._seconds: collections.deque[float] = collections.deque(maxlen=101)
        self._moved_at = time.monotonic()
        self._ended = threading.Event()
        self._poll = min(1.0, least_seconds / 10)

    def start(self, step_number: int) -> None:
        """From now on something must move."""
        self.step_number = step_number
        self._moved_at = time.monotonic()
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
        self.step_number = step_number
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
        return max(FACTOR * median, self._least, self._bound)

    def _watch(self) -> None:
        looked_at = time.monotonic()
        while not self._ended.wait(self._poll):
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
                self._hung(
                    f"nothing moved for {now - self._moved_at:.0f} s "
                    f"(limit: {FACTOR:g} median steps, at least {self._least:g} s)"
                )
                return


def write_stacks(path: Path, heading: str) -> None:
    """Writes the stack of every thread of this process under a heading."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.write(heading + "\n\n")
        file.flush()
        faulthandler.dump_traceback(file=file, all_threads=True)
