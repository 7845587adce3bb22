"""Where the wall clock of a run goes, over all its starts; its goodput is the share of its steps.

At each moment one cause is charged, so the causes add up to the time since the first start.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stablelm_jax.storage.files import PARTIAL

CAUSES = (
    "start",  # of a process, up to the first program compiled: imports, services, opening data
    "compile",
    "restore",  # of a checkpoint, or of a branch's parent
    "data_wait",
    "step",
    "evaluation",  # held-out text and tasks
    "samples",
    "save",  # only what the training was held up
    "redone",  # what a kill took: steps, and the evaluations and samples among them
    "between",  # from the last sign of life of one start to the next process
)
_OF_PHASE = {  # `StopRequest.phase`; any other goes on with the cause around it
    **{"starting": "start", "restoring": "start", "compiling": "compile", "stepping": "step"},
    **{"evaluating": "evaluation", "sampling": "samples", "saving": "save", "finishing": "save"},
    "reference": "reference",  # of DPO alone
}
_DONE_AGAIN = ("data_wait", "step", "evaluation", "samples")
_SIGN_SECONDS = 10.0  # between two signs of life, where steps are longer than that: a step

Record = Mapping[str, Any]  # {"time": since 1970, "seconds": {cause: seconds until then}}


class Goodput:
    """Charges the seconds of this start, and adds up those of all starts."""

    def __init__(self, age: float = 0.0):
        """`age`: seconds since this start of the run began."""
        self._own: Counter[str] = Counter()
        self._cause, self._since = "start", time.monotonic() - age
        self._began = time.time() - age
        self._last: Record = {}  # what the former starts have left
        self._former: Record = {}  # the same, but for what is done again
        self._file: Path | None = None
        self._has_begun, self._kept_at = False, self._since

    @contextlib.contextmanager
    def cause(self, name: str) -> Iterator[None]:
        """Charges what is inside to this cause, and what comes then to the one before."""
        before = self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """`cause` of a phase of the run. Its beginning and its end are signs of life."""
        with self.cause(_OF_PHASE.get(name, self._cause)):
            self.keep()
            try:
                yield
            finally:
                self.keep()

    def _switch(self, name: str) -> str:
        before, now = self._cause, time.monotonic()
        self._own[before] += now - self._since
        self._cause, self._since = name, now
        if now - self._kept_at > _SIGN_SECONDS:
            self.keep()
        return before

    def seconds(self) -> dict[str, float]:
        """{cause: seconds}, over all starts, until now."""
        total = Counter(dict.fromkeys(CAUSES, 0.0))
        total.update(self._former.get("seconds", {}))
        total.update(self._own)
        total[self._cause] += time.monotonic() - self._since
        total["between"] += max(0.0, self._began - self._former.get("time", self._began))
        return dict(total)

    def record(self) -> Record:
        """`seconds` as JSON, for a file or a checkpoint."""
        return {"time": time.time(), "seconds": self.seconds()}

    def line(self) -> dict[str, float]:
        """`seconds` as metrics."""
        return {f"seconds/{cause}": round(s, 3) for cause, s in self.seconds().items()}

    def __str__(self) -> str:
        seconds = self.seconds()
        total = sum(seconds.values())
        parts = ", ".join(f"{name} {s:,.1f}" for name, s in seconds.items() if s >= 0.05)
        share = f"goodput {seconds['step'] / total:.1%}: steps, of {total:,.1f} s"
        return f"{share} since the first start ({parts})"

    @contextlib.contextmanager
    def kept_in(self, file: Path | None) -> Iterator[None]:
        """`file` shows this start's signs of life, after those of former ones; None: it does not.

        A new file is written once `go_on` was called: a run that cannot begin leaves none.
        """
        self._file = file
        # One that is missing, or that a loss of power has left empty, says nothing.
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            found = json.loads(file.read_text(encoding="utf-8"))
            seconds = {cause: float(value) for cause, value in found["seconds"].items()}
            self._last = self._former = {"time": float(found["time"]), "seconds": seconds}
            self._has_begun = True
        try:
            yield
        finally:
            self.keep()
            self._file = None

    def go_on(self, saved: Record) -> None:
        """From a checkpoint with this record, {} without one: what came after is done again.

        The file may be of another machine, or older than the checkpoint: the newer one counts.
        """
        last = max(self._last, saved, key=lambda record: record.get("time", 0.0))
        last = last or saved  # of older versions, without a time
        then, seconds = saved.get("seconds", {}), Counter(last.get("seconds", {}))
        for cause in _DONE_AGAIN:
            lost = max(0.0, seconds[cause] - then.get(cause, 0.0))
            seconds[cause] -= lost
            seconds["redone"] += lost
        self._former, self._has_begun = {**last, "seconds": seconds}, True
        self.keep()

    def keep(self) -> None:
        """A sign of life. A disk that refuses it ends no run."""
        if self._file is None or not self._has_begun:
            return
        self._kept_at = time.monotonic()
        with contextlib.suppress(OSError):
            aside = self._file.with_name(self._file.name + PARTIAL)
            aside.write_text(json.dumps(self.record()) + "\n", encoding="utf-8")
            aside.replace(self._file)  # without waiting for the disk: a loss of power may take it


def process_age() -> float:
    """Seconds since this process began; 0 where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # after the machine's own start
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    return 0.0
