"""Several processes after the start: each hears within moments that another is gone, and leaves.

Where a process dies, jax's collectives fail on some of the others and wait for ever on the rest,
and its own watch takes 100 s and ends them from C++ with exit code 134. So each process keeps the
connection by which it met process 0: the operating system closes it when a process ends, however.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import NoReturn, TextIO

from stablelm_jax.run.events import HEARING_SECONDS
from stablelm_jax.run.signals import EXIT_STOPPED, StopRequest

# Set by launch scripts, which start all again after 75: so it is 75 before a checkpoint too.
_LAUNCHED = "STABLELM_STARTED_AGAIN"
_FATES = {  # of a process, by its exit code: all of them, started again, may go on
    "killed": "is gone, killed or with its machine",
    str(EXIT_STOPPED): f"has stopped with exit code {EXIT_STOPPED}",
}
_LAST_SECONDS = 5.0  # for the last words, and for a way out of Python that waits for others
# A machine without power closes no connection: it is asked after 20 s of silence, six times.
_KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}


class Peers:
    """Connections between process 0 and each of the others. Make it before jax starts among them.

    Each says one line before it ends: "INDEX CODE HOST", where CODE is "end" if all come to the
    same end by themselves. A connection that closes without it belonged to one that was killed.
    """

    def __init__(self, index: int, connections: Mapping[int, socket.socket], stop: StopRequest):
        """`index`: of this process. `connections`: by which it met the others (`meet`).

        `stop`: says what is safe when this process leaves; its `leave` now tells the others.
        """
        self._index, self._connections, self._stop = index, connections, stop
        self._ended, self._code = threading.Event(), 0
        self._lock = threading.Lock()
        _delay_aborts()
        stop.leave = self._leave
        for other, connection in connections.items():
            _keep_alive(connection)
            threading.Thread(target=self._listen, args=(other, connection), daemon=True).start()

    def end(self, code: int) -> int:
        """All processes have come to this end together; returns the exit code."""
        self._code = code
        self._ended.set()
        sys.stdout.flush()
        self._say("end")
        return code

    def _leave(self, code: int) -> NoReturn:
        self._say(str(code))
        os._exit(code)

    def _say(self, what: str) -> None:
        self._send(f"{self._index} {what} {socket.gethostname()}\n")

    def _send(self, line: str) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(line.encode())

    def _listen(self, index: int, connection: socket.socket) -> None:
        with connection.makefile() as lines:
            if (line := _next(lines)).split()[1:2] == ["end"]:
                _next(lines)  # nothing comes but the end of that process
                self._ended.wait()
        self._follow(line or f"{index} killed ?\n")

    def _follow(self, line: str) -> NoReturn:
        """A process is gone, and so this one leaves."""
        with self._lock:  # whoever goes after the first only follows it
            if self._ended.is_set():  # jax may wait for the one that is gone
                time.sleep(_LAST_SECONDS)
                os._exit(self._code)
            self._send(line)
            index, code, host = line.split()
            may_go_on = code in _FATES
            if not may_go_on:  # the same error may have come up here: then it is told, not this
                time.sleep(2 * HEARING_SECONDS)
            threading.Timer(_LAST_SECONDS, os._exit, (1,)).start()  # a disk may hang
            safe = self._stop.what_is_safe()
            whole = safe != self._stop.safe
            mine = EXIT_STOPPED if may_go_on and (whole or _LAUNCHED in os.environ) else 1
            threading.Timer(_LAST_SECONDS / 2, os._exit, (mine,)).start()  # a terminal may hang
            name = f"process {index}" + (f" ({host})" if host != "?" else "")
            fate = _FATES.get(code, "ended with an error, which its own output tells")
            advice = "; run the same command again to go on" if may_go_on else ""
            try:
                self._stop.tell(f"{name} {fate}; {safe}{advice}")
            finally:
                os._exit(mine)


def _next(lines: TextIO) -> str:
    """The next line; empty where the connection is closed."""
    with contextlib.suppress(OSError, ValueError):
        return lines.readline()
    return ""


def _keep_alive(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _delay_aborts() -> None:
    """Gives the threads above the time to leave in good order.

    jax ends a process from C++, by `abort`, as soon as process 0 is gone, and a handler in Python
    would come too late. C's own `sleep` as the handler waits 6 s: the number of that signal.
    """
    libc = ctypes.CDLL(None)
    libc.signal(int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))
