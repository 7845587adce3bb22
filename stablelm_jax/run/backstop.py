"""Ends a process from C, where no thread of Python can run: native code may hold its one lock.

POSIX timers of the kind SIGEV_THREAD call a function of C in a thread of its own. Linux alone has
them; elsewhere `faulthandler` ends the process, and can do so with exit code 1 only.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import sys
from pathlib import Path
from typing import Any

_THREAD = 2  # SIGEV_THREAD
_MONOTONIC = 1  # CLOCK_MONOTONIC


class _Notification(ctypes.Structure):
    """`struct sigevent`: call `function(argument)`."""

    _fields_ = [
        ("argument", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("how", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("rest", ctypes.c_char * 40),
    ]


class Backstop:
    """Unless it is set anew in time, writes the stacks and ends the process with `code`."""

    def __init__(self, stacks: Path, text: str, code: int):
        """`stacks`: the file that the stacks are added to. `text`: printed after them."""
        stacks.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._file = stacks, stacks.open("a", encoding="utf-8")
        self._timers: list[ctypes.c_void_p] = []
        if sys.platform == "linux":
            self._libc, self._text = ctypes.CDLL(None), ctypes.create_string_buffer(text.encode())
            self._add_timer(self._libc.puts, ctypes.addressof(self._text))
            self._add_timer(self._libc.fflush, None)  # of every stream
            self._add_timer(self._libc._exit, code)

    def _add_timer(self, function: Any, argument: int | None) -> None:
        address, timer = ctypes.cast(function, ctypes.c_void_p), ctypes.c_void_p()
        call = _Notification(argument, 0, _THREAD, address)
        if self._libc.timer_create(_MONOTONIC, ctypes.byref(call), ctypes.byref(timer)) == 0:
            self._timers.append(timer)

    def set(self, seconds: float) -> None:
        """The process has so many seconds from now on."""
        faulthandler.dump_traceback_later(seconds, file=self._file, exit=not self._timers)
        self._start(int(seconds))

    def stop(self) -> None:
        """The process has all the time it needs."""
        faulthandler.cancel_dump_traceback_later()
        self._start(None)
        self._file.close()
        if self._path.stat().st_size == 0:
            self._path.unlink()
            with contextlib.suppress(OSError):  # other files are there
                self._path.parent.rmdir()

    def _start(self, seconds: int | None) -> None:
        for number, timer in enumerate(self._timers, 1):  # a second after the stacks, one by one
            value = 0 if seconds is None else seconds + number
            interval_and_value = (ctypes.c_long * 4)(0, 0, value, 0)
            self._libc.timer_settime(timer, 0, ctypes.byref(interval_and_value), None)
