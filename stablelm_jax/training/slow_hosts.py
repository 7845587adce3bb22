"""Which of several hosts the others wait for.

Devices wait for each other in every step, so a step takes equally long on all hosts, whichever is
slow. What differs is how long each takes to bring its part of a batch to its devices, before the
step: that goes along with the votes that the loop exchanges anyway. P processes.
"""

from __future__ import annotations

import socket

import numpy as np

from stablelm_jax.parallel import distributed
from stablelm_jax.run.events import Events

FACTOR, SHARE, LINES = 2.0, 0.1, 5  # of the others' median; of a step; in so many lines in a row


class SlowHosts:
    """Adds up the seconds before each step, by process; told is who is slow for long."""

    def __init__(self, events: Events):
        """Waits for all processes."""
        self._names, self._events = distributed.gathered(socket.gethostname()), events
        self._seconds_P, self._steps = np.zeros(len(self._names)), 0
        self._slow, self._lines = -1, 0  # who was so in how many of the last lines

    def add(self, seconds_P: np.ndarray) -> None:
        """One step's seconds."""
        self._seconds_P = self._seconds_P + seconds_P
        self._steps += 1

    def line(self, step: int, step_seconds: float) -> dict[str, float]:
        """Metrics since the last line; {} for one process alone.

        "step_seconds/slowest_host": its index; "step_seconds/spread": by how many seconds a step it
        is slower than the median of the others.
        """
        if len(self._names) == 1:
            return {}
        mean_P = self._seconds_P / max(1, self._steps)
        slowest = int(mean_P.argmax())
        seconds, others = mean_P[slowest], float(np.median(np.delete(mean_P, slowest)))
        spread = float(seconds - others)
        self._seconds_P, self._steps = np.zeros_like(mean_P), 0
        is_slow = seconds > FACTOR * others and spread > SHARE * step_seconds
        self._lines = (self._lines + 1 if slowest == self._slow else 1) if is_slow else 0
        self._slow = slowest
        if self._lines == LINES and distributed.is_first():
            text = (
                f"process {slowest} ({self._names[slowest]}) holds the others up: its part of a "
                f"batch takes it {seconds:.2f} s, the others {others:.2f} s (median), of "
                f"{step_seconds:.2f} s a step; look at its disk, its network and what else it runs"
            )
            self._events.tell("slow_host", text, step=step, process=slowest)
        return {"step_seconds/slowest_host": slowest, "step_seconds/spread": spread}
