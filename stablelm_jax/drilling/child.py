"""One training of a drill: `python -m stablelm_jax.drilling.child PLAN.json FLAGS OF TRAIN`.

PLAN.json: {"records": folder, "process": number, "checkpoints": folder, "fault": null or a Fault}.
The process records how long its phases take, `records/phases-<process>.jsonl`, and sends itself the
planned signals; just before them it writes `records/hit-<process>.json`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from stablelm_jax.drilling.plan import KILL, ONCE, TWICE, Fault
from stablelm_jax.run import signals

_POLL = 0.0005  # seconds; finalising takes milliseconds
_HALF_WRITTEN = "*.orbax-checkpoint-tmp*"


class Observer:
    """Hears of each phase as it begins; knows which are under way, times them, and strikes."""

    def __init__(self, plan: dict[str, Any]):
        records, process = Path(plan["records"]), plan["process"]
        self._hit = records / f"hit-{process}.json"
        self._checkpoints = Path(plan["checkpoints"])
        self._fault = Fault(**plan["fault"]) if plan["fault"] else None
        self._file = (records / f"phases-{process}.jsonl").open("a", encoding="utf-8")
        self._lock = threading.Lock()
        self._under_way: dict[str, tuple[str, float]] = {}  # "main", "store": phase, its begin
        self._seen, self._armed = 0, False
        self._lasted: float | None = None  # seconds, the fault's phase when it came last

    def __call__(self, phase: str) -> None:
        """From any thread."""
        if phase == "written":
            return  # noticed long after it has happened; see `_until_whole`
        with self._lock:
            self._begin("store" if phase in ("writing", "finalising") else "main", phase)
        if phase == "finalising":
            threading.Thread(target=self._until_whole, daemon=True).start()
        if self._fault is not None and phase == self._fault.phase:
            self._seen += 1
            if self._seen >= self._fault.occurrence and not self._armed:
                self._armed = True
                threading.Thread(target=self._wait, args=(self._begun(),), daemon=True).start()

    def _begin(self, who: str, phase: str | None) -> None:
        now = time.monotonic()
        before = self._under_way.pop(who, None)
        if before is not None:
            line = {"phase": before[0], "seconds": now - before[1]}
            print(json.dumps(line), file=self._file, flush=True)
            if self._fault is not None and before[0] == self._fault.phase:
                self._lasted = line["seconds"]
        if phase is not None:
            self._under_way[who] = phase, now

    def _begun(self) -> float | None:
        """When the phase of the fault began; None if it is not under way."""
        with self._lock:
            begins = {phase: begin for phase, begin in self._under_way.values()}
        return begins.get(self._fault.phase)

    def _until_whole(self) -> None:
        while any(self._checkpoints.glob(_HALF_WRITTEN)):
            time.sleep(_POLL)
        with self._lock:
            if self._under_way.get("store", ("",))[0] == "finalising":
                self._begin("store", None)

    def _wait(self, begun: float | None) -> None:
        again = self._fault.phase not in ONCE
        known = again and self._lasted is not None
        time.sleep(random.uniform(0, self._lasted) if known else self._fault.delay)
        if again and (begun is None or begun != self._begun()):
            self._armed = False  # over before that: the next time
        else:
            self._strike()

    def _strike(self) -> None:
        fault = self._fault
        with self._lock:
            phases = {who: phase for who, (phase, _) in self._under_way.items()}
        there = phases.values()
        phase = fault.phase if fault.phase in there else phases.get("store", phases["main"])
        aside = self._hit.with_suffix(".partial")
        aside.write_text(json.dumps({"phase": phase, "phases": phases, "time": time.time()}))
        os.replace(aside, self._hit)
        if fault.kind == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGTERM)
        if fault.kind == TWICE:
            time.sleep(fault.gap)
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Trains, observed."""
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    signals.observers.append(Observer(plan))
    from stablelm_jax import train

    sys.argv = ["train", *sys.argv[2:]]
    train.main()


if __name__ == "__main__":
    main()
