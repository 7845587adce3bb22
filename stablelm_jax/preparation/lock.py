"""One process at a time, also where several machines share a disk."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_BEAT_SECONDS = 2.0
_WATCH_SECONDS = 15.0


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Holds the lock file `path` while the block runs.

    The system's lock ends with its process, but some shared disks keep it to a single machine (NFS
    with `nolock`, BeeGFS, Lustre with `localflock`). So the holder also writes its name and a
    counter into the file; one of another machine whose counter stands still for a while is dead.

    Raises BlockingIOError, which names the holder's machine and process.
    """
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_nlink:  # its holder removed it a moment ago
                raise BlockingIOError
            is_dead = path.read_text(encoding="utf-8").split(" ")[0] in ("", socket.gethostname())
        except BlockingIOError:
            raise _held(path) from None
        except OSError:  # a disk without such locks
            is_dead = not path.read_text(encoding="utf-8")
        if not is_dead and _counter_moves(path):
            raise _held(path)
        now = time.strftime("%Y-%m-%dT%H:%M:%S")
        holder, done = f"{socket.gethostname()} {os.getpid()} {now}", threading.Event()
        _write(file, f"{holder} 0")
        beats = threading.Thread(target=_beat, args=(file, holder, done), daemon=True)
        beats.start()
        try:
            yield
        finally:
            done.set()
            beats.join()
            with contextlib.suppress(OSError):
                path.unlink()


def _beat(file: BinaryIO, holder: str, done: threading.Event) -> None:
    for count in itertools.count(1):
        if done.wait(_BEAT_SECONDS):
            return
        _write(file, f"{holder} {count}")


def _write(file: BinaryIO, text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk must not end the work
        os.pwrite(file.fileno(), text.encode(), 0)
        file.truncate(len(text))  # a dead holder's line may have been longer
        os.fsync(file.fileno())


def _counter_moves(path: Path) -> bool:
    before, end = path.read_text(encoding="utf-8"), time.monotonic() + _WATCH_SECONDS
    while time.monotonic() < end:
        time.sleep(_BEAT_SECONDS / 2)
        # Opened anew each time: NFS looks at the server then. Its holder may remove it.
        if not path.exists() or path.read_text(encoding="utf-8") != before:
            return True
    return False


def _held(path: Path) -> BlockingIOError:
    holder = "another process"
    with contextlib.suppress(FileNotFoundError, ValueError):  # it has just begun, or just ended
        host, process, since, _ = path.read_text(encoding="utf-8").split(" ")
        holder = f"process {process} on {host}, since {since},"
    return BlockingIOError(f"{path.parent}: {holder} is at work here; wait for it or end it")
