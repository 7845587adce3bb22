"""What asks a run to stop (signals, Google's notices), and what that does in each phase of the run.

The loop looks at `StopRequest.name` between two steps, saves and leaves with exit code 75. Python
runs signal handlers between two instructions of its main thread only, and a compilation is one
instruction that takes minutes. So a thread hears of signals through a pipe, and ends the process at
once in a phase that has nothing to save. This module imports neither jax nor anything else that is
slow to import, because it listens from the first moment of a process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from stablelm_jax.run.goodput import Goodput, process_age

EXIT_STOPPED = 75
# Besides Ctrl-C and the usual one: a terminal that is closed, and the two that SLURM jobs are
# commonly warned with.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_PRODUCT = Path("/sys/class/dmi/id/product_name")
# What Google's metadata server is asked, and the answer that announces the end of the machine.
_NOTICES = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
_WAIT_SECONDS = 60  # the server answers when the value changes, or after this
_PAUSE_SECONDS = 1.0  # after a server that did not wait, or gave no answer


class StopRequest:
    """While entered, signals and notices set `name` instead of ending the process."""

    def __init__(self, *, last: bool = False) -> None:
        """`last`: the process ends afterwards, and no signal is to change how."""
        self._last = last
        self.goodput = Goodput(process_age() if last else 0.0)  # charged by phase
        self.name: str | None = None  # the first signal or notice heard
        self.safe = "nothing had begun"  # as long as there is no whole checkpoint
        self.whole: Callable[[], object | None] = lambda: None  # finds the newest of these
        self.tell: Callable[[str], None] = _say  # the last line of a process that leaves at once
        self.leave: Callable[[int], NoReturn] = os._exit  # at once, with an exit code
        self.phase_name, self._leave = "starting", True
        self._heard_at: float | None = None
        self._lock = threading.RLock()
        self._before: dict[int, object] = {}

    def what_is_safe(self) -> str:
        """A sentence on the run's state, for a process that leaves at once."""
        with contextlib.suppress(OSError):  # the disk's
            if whole := self.whole():
                return f"checkpoint {whole} is whole"
        return self.safe

    def seconds_since(self) -> float:
        """Seconds since the first signal or notice; 0 where there was none."""
        return 0.0 if self._heard_at is None else time.monotonic() - self._heard_at

    def __enter__(self) -> StopRequest:
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self.listen()
        threading.Thread(target=self._hear_signals, name="signals", daemon=True).start()
        return self

    def listen(self) -> None:
        """Takes the signals; call it again after a library has taken them for itself."""
        signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        for number in SIGNALS:  # the pipe is written only for a signal with a handler in Python
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup asks for that
            before = signal.signal(number, lambda *_: None)
            self._before.setdefault(number, before)

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._last else handler)
        os.close(self._writing)  # ends the thread, which closes the other side

    @contextlib.contextmanager
    def phase(self, name: str, *, leave: bool = False) -> Iterator[None]:
        """Names what the run does; with `leave` a signal ends the process at once."""
        before = self.phase_name, self._leave
        with self._lock:
            self.phase_name, self._leave = name, leave
            if leave and self.name is not None:
                self._leave_at_once()
        try:
            with self.goodput.phase(name):
                yield
        finally:
            # Even where a signal would end the outer phase at once, coming back to it does not: the
            # run may have reached its end, and only what it does next can tell.
            self.phase_name, self._leave = before

    def hear(self, name: str) -> None:
        """Notes that a signal or notice has come; may be called from any thread."""
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
            f"stopped by {self.name} while {self.phase_name}, {self.seconds_since():.1f} s after "
            f"it: {self.what_is_safe()}; run the same command again to go on"
        )
        self.goodput.keep()
        self.leave(EXIT_STOPPED)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody may read our output any more
        print(text, flush=True)


def watch_notices(hear: Callable[[str], None]) -> None:
    """On Google's machines, threads call `hear` with the name of a notice; else nothing happens."""
    from stablelm_jax.parallel.distributed import METADATA_HOST  # imports jax

    host = os.environ.get("GCE_METADATA_HOST") or None  # as Google's own libraries read it
    with contextlib.suppress(OSError):
        if host is None and "Google" in _PRODUCT.read_text(encoding="utf-8"):
            host = METADATA_HOST
    if host is not None:
        for what in _NOTICES:
            threading.Thread(target=_wait_for, args=(host, what, hear), daemon=True).start()


def _wait_for(host: str, what: str, hear: Callable[[str], None]) -> None:
    import urllib.request

    from stablelm_jax.parallel.distributed import metadata_request

    first, path = True, what
    while True:
        asked_at = time.monotonic()
        with contextlib.suppress(OSError, ValueError):  # urllib's errors are among them
            request = metadata_request(path, host)
            with urllib.request.urlopen(request, timeout=2 * _WAIT_SECONDS) as answer:
                announced = answer.read().decode().strip() == _NOTICES[what]
                etag = answer.headers.get("ETag", "0")
            path = f"{what}?wait_for_change=true&timeout_sec={_WAIT_SECONDS}&last_etag={etag}"
            # Maintenance is announced long before: a run that starts meanwhile does not leave.
            if announced and not (first and what == "maintenance-event"):
                hear(f"Google Cloud's notice {what}={_NOTICES[what]}")
                return
            first = False
        if time.monotonic() - asked_at < _PAUSE_SECONDS:
            time.sleep(_PAUSE_SECONDS)
