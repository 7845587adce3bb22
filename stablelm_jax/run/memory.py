"""What the C library does with memory that a step frees."""

from __future__ import annotations

import contextlib
import ctypes

# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """For XLA on a CPU: arrays that one step frees are those of the next, with no new page.

    Left alone, glibc gives each large one back to the system, which clears every page of the next:
    a third of a step's CPU time. To be called before any thread is started, since only memory of
    the first arena can grow without mmap. Does nothing where there is no glibc.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        for parameter, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1)):
            libc.mallopt(parameter, value)
