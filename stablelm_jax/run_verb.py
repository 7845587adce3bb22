"""What stands between a verb and its terminal: output, Ctrl-C, crashes of native code.

Output for a person never decides whether the work lives. A verb begins with `run_verb`, and
whatever is printed from then on, by us, by rich or by another library, goes through streams that
drop what cannot be written. Nothing here is slow to import.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import faulthandler
import glob
import importlib
import io
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from stablelm_jax.run.console import note_loss

_GRACE_SECONDS = 5.0  # to clean up after Ctrl-C
_STALL_SECONDS = 5.0  # that work waits for a reader who does not read, as a terminal after Ctrl-S
_AT_ONCE = 4096  # bytes that a pipe takes without waiting, once it takes any
# NVIDIA's (the second inside Windows), AMD's and TPUs.
_CHIPS = ("/dev/nvidia*", "/dev/dxg", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")
_heard = threading.Event()  # Ctrl-C
_told = "interrupted"  # the line that is said then


def run_verb(
    main: Callable[[], int | None] | None,
    name: str,
    *,
    prints_result: bool = False,
    interrupted: str | None = "nothing was written",
) -> NoReturn:
    """Runs a verb to its exit code.

    Args:
      main: None for that of stablelm_jax.NAME, which is imported first.
      prints_result: the result is what it prints. Then the verb ends where stdout does: quietly
        with 0 when the reader has gone, as `head` does; with 1 when a disk is full. Otherwise what
        cannot be printed is dropped, and the work goes on.
      interrupted: what Ctrl-C leaves, told in the one line of exit code 130; None where `main`
        listens to it.
    """
    guard_output(prints_result=prints_result)
    faulthandler.enable(2)
    if sys.platform == "linux" and not any(map(glob.glob, _CHIPS)):
        # Else jax asks the plugins of chips too, which may be here to compile for them: pages of
        # errors. The verb has not imported jax yet, which reads this once.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    line = f"{name}: interrupted; {interrupted or 'run the same command again to go on'}"
    if interrupted is not None:
        end_after_interrupt(line)
    try:
        code = (main or importlib.import_module(f"stablelm_jax.{name}").main)()
    except SystemExit as leaving:
        code = leaving.code
    except KeyboardInterrupt:
        _leave_interrupted(line)
    except BaseException:  # a library may turn a KeyboardInterrupt into an error of its own
        if not _heard.is_set():
            raise
    if _heard.is_set():
        _leave_interrupted(line)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what remains is Python's own end
    with contextlib.suppress(SystemExit) if code else contextlib.nullcontext():
        sys.stdout.flush()  # a result that is not all there is an error, here for the last time
    sys.exit(code)


def answer_interrupts() -> None:
    """From here on each Ctrl-C is a KeyboardInterrupt that the verb answers and may survive."""
    if signal.getsignal(signal.SIGINT) is _interrupt:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end_after_interrupt(line: str) -> None:
    """Ctrl-C says `line` and ends the process soon, whatever its main thread is doing.

    Python raises KeyboardInterrupt between two of its instructions, and a compilation is one of
    minutes; raised in a callback of a library, it is swallowed. So a thread hears of it too.
    """
    global _told
    if signal.getsignal(signal.SIGINT) != signal.default_int_handler:
        return  # called before; or ignored, as in the background of a script
    _told, (reading, writing) = line, os.pipe()
    os.set_blocking(writing, False)
    signal.signal(signal.SIGINT, _interrupt)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def wait() -> None:
        while signal.SIGINT not in os.read(reading, 64):
            pass
        time.sleep(_GRACE_SECONDS)
        _leave_interrupted(line)

    threading.Thread(target=wait, name="interrupts", daemon=True).start()


def _interrupt(_: int, frame: FrameType | None) -> None:
    _heard.set()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not end the cleaning up
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _leave_interrupted(_told)  # native code whose import is cut short may crash
        frame = frame.f_back
    # Where a library swallows it, or makes another error of it, Python would print its stacks.
    sys.unraisablehook = sys.excepthook = lambda *_: None
    raise KeyboardInterrupt


def _leave_interrupted(line: str) -> NoReturn:
    """Says it and leaves at once: a library's threads, and its way to end, are not waited for."""
    print(line, file=sys.stderr)
    with contextlib.suppress(SystemExit):
        sys.stdout.flush()
    os._exit(130)  # as shells give it for Ctrl-C


def guard_output(*, prints_result: bool = False) -> None:
    """Replaces sys.stdout and sys.stderr by streams that never fail; stdin is read as UTF-8.

    What a stream cannot encode is written as an escape (\\xe9).
    """
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # it was closed: else the next file opened would get what is printed
    os.close(spare)
    codecs.register_error("escape_and_note", _escape)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)  # None where it was closed
        stream = io.TextIOWrapper(
            _Guarded(descriptor, name, is_result=prints_result and name == "stdout"),
            encoding=old.encoding if old else "utf-8",
            errors="escape_and_note",
            line_buffering=name == "stderr" or os.isatty(descriptor),
            write_through=bool(old and old.write_through),
        )
        setattr(sys, name, stream)
    sys.stdin = open(0, encoding="utf-8", closefd=False)


class _Guarded(io.FileIO):
    """A descriptor to which writing does not fail."""

    def __init__(self, descriptor: int, name: str, *, is_result: bool):
        super().__init__(descriptor, "w", closefd=False)
        self._name, self._is_result = name, is_result
        self._stalled = False
        self._ready = select.poll()
        self._ready.register(descriptor, select.POLLOUT)

    def write(self, data: Any) -> int:
        """Writes all, or drops what cannot be written; the length of `data` in any case."""
        rest = memoryview(data)
        try:
            while rest:
                wait = None if self._is_result else 0 if self._stalled else 1000 * _STALL_SECONDS
                self._stalled = not self._ready.poll(wait)
                if self._stalled:
                    raise TimeoutError(errno.ETIMEDOUT, "nobody reads it")
                rest = rest[os.write(self.fileno(), rest[:_AT_ONCE]) :]
        except OSError as error:
            text = f"{self._name} cannot be written: {error.strerror}"
            note_loss(self._name, f"{text}; what is lost there is not shown again")
            if self._is_result:
                self._is_result = False
                raise SystemExit(0 if error.errno == errno.EPIPE else f"error: {text}") from None
        return len(data)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    what = f"{error.encoding} lacks characters that were shown as escapes"
    note_loss("encoding", f"{what}; set PYTHONIOENCODING=utf-8")
    return codecs.backslashreplace_errors(error)
