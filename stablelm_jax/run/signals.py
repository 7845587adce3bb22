"""What asks a run to stop, and what becomes of it in each phase.

The loop looks at `StopRequest.name` between two steps, saves and leaves with exit code 75. Python
runs the handlers of signals between two instructions of its main thread only, and a compilation is
one instruction of minutes: so a thread hears of signals through a pipe, and in a phase in which
there is nothing to save it ends the process at once. This module imports neither jax nor anything
else that takes long: it listens from the first moment of a process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType

EXIT_STOPPED = 75
# Besides Ctrl-C and the usual one, the two that SLURM jobs are commonly warned with.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """While entered, signals and notices set `name` instead of ending the process.

    Attributes:
      name: of the first one heard, or None.
      safe: what a process that leaves at once says of the run's state.
    """

    def __init__(self, *, last: bool = False) -> None:
        """`last`: the process ends afterwards, and no signal is to change how."""
        self._last = last
        self.name: str | None = None
        self.safe = "nothing had begun"
        self._heard_at: float | None = None
        self._phase, self._leave = "starting", True
        self._lock = threading.RLock()
        self._before: dict[int, object] = {}

    @property
    def phase_name(self) -> str:
        """The phase that the run is in."""
        return self._phase

    def seconds_since(self) -> float:
        """Since the first signal or notice; 0 where there was none."""
        return 0.0 if self._heard_at is None else time.monotonic() - self._heard_at

    def __enter__(self) -> StopRequest:
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self.listen()
        threading.Thread(target=self._hear_signals, name="signals", daemon=True).start()
        return self

    def listen(self) -> None:
        """Takes the signals; again after a library that takes them for itself has started."""
        signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        for number in SIGNALS:
            before = signal.signal(number, _nothing)
            self._before.setdefault(number, before)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._last else handler)
        os.close(self._writing)  # ends the thread, which closes the other side

    @contextlib.contextmanager
    def phase(self, name: str, *, leave: bool = False) -> Iterator[None]:
        """Names what the run does; `leave`: a signal then ends the process at once."""
        before = self._phase, self._leave
        with self._lock:
            self._phase, self._leave = name, leave
            if leave and self.name is not None:
                self._leave_at_once()
        try:
            yield
        finally:  # going back is no reason to leave: what follows may be the end of the run
            self._phase, self._leave = before

    def hear(self, name: str) -> None:
        """A signal or notice has come; from any thread."""
        with self._lock:
            if self.name is not None:
                _say(f"{name}: stopping already, since {self.name}; the checkpoint comes first")
                return
            self.name, self._heard_at = name, time.monotonic()
            if self._leave:
                self._leave_at_once()
            _say(f"{name}: stopping; the checkpoint comes first")

    def _hear_signals(self) -> None:
        with open(self._reading, "rb", buffering=0) as pipe:
            while numbers := pipe.read(64):
                for number in numbers:
                    if number in SIGNALS:
                        self.hear(signal.Signals(number).name)

    def _leave_at_once(self) -> None:
        _say(
            f"stopped by {self.name} while {self._phase}, {self.seconds_since():.1f} s after it: "
            f"{self.safe}; run the same command again to go on"
        )
        os._exit(EXIT_STOPPED)


def _nothing(number: int, frame: FrameType | None) -> None:
    """A signal must have a handler in Python for the pipe to be written."""


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # whoever read our output may be gone
        print(text, flush=True)
        sys.stderr.flush()
