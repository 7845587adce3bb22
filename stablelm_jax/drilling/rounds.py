"""A drill: the undisturbed training, then rounds of signals and restarts, each one compared."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from stablelm_jax import config as config_lib
from stablelm_jax.checkpoint.names import finished_steps
from stablelm_jax.drilling import resolved
from stablelm_jax.drilling.comparison import first_difference
from stablelm_jax.drilling.phases import LEAVING, PHASES, phase_of
from stablelm_jax.run.metrics import MetricsFile
from stablelm_jax.run.signals import EXIT_STOPPED
from stablelm_jax.storage.files import write_json

KILL, TERM, TWICE = KINDS = ("SIGKILL", "SIGTERM", "two signals")
_POLL = 0.002  # seconds; some phases last for 20 ms
# Seconds that processes get after the first one has ended. They would wait without end for one that
# was killed or left at once: a scheduler ends them, and so does the drill.
_GRACE, _SHORT_GRACE = 60.0, 3.0
_LONGER, _SHORTEST_LIMIT = 20, 300.0  # times an undisturbed run, seconds: so long a start hangs
_MOST_MISSES = 4  # of a fault, after which the drill has failed
_PER_ROUND = 12  # faults


@dataclasses.dataclass(frozen=True)
class Fault:
    """A signal that a training is to meet. `misses`: how often it came too late or not at all."""

    phase: str
    kind: str
    misses: int = 0


class Start:
    """One start of the training in `workdir`, which is to meet `fault`.

    Attributes:
      hit: the phase in which the signal came; None where it did not come.
      seconds: from the signal to the exit.
      codes: the exit code of each process, negative for a signal; -9 where it had to be ended.
      problem: what is not as it should be after the signal; None where all is.
    """

    def __init__(self, drill: Drill, workdir: Path, fault: Fault | None, rng: random.Random):
        self.workdir, self.fault, self._drill, self._rng = workdir, fault, drill, rng
        self.hit: str | None = None
        self.seconds = 0.0
        self._strike_at: float | None = None
        self._tries = 0 if fault is None else fault.misses

    def run(self) -> Start:
        """Returns when all processes have ended."""
        self._launched, self._phase, self._since = time.time_ns(), "", time.monotonic()
        self._log = self._drill.folder / "output" / f"{self.workdir.name}-{self._launched}.txt"
        self._processes = self._launch()
        self._target = self._rng.choice(self._processes)
        try:
            self._watch()
        finally:
            for process in self._processes:
                process.kill()
            self.codes = [process.wait() for process in self._processes]
        if not self.hit:
            self._drill.lasted[self._phase] = time.monotonic() - self._since
        self.problem = self._find_problem() if self.hit else None
        return self

    def _launch(self) -> list[subprocess.Popen]:
        count, environment = self._drill.processes, dict(os.environ)
        if self.fault is not None and self.fault.phase == "compiling":
            environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        if self._drill.devices is not None:
            environment["JAX_NUM_CPU_DEVICES"] = str(self._drill.devices)
        command = [sys.executable, "-m", "stablelm_jax.train", f"--workdir={self.workdir}"]
        command += [f"--config={resolved.__file__}:{self._drill.folder}/config.json", "--strict"]
        places: list[list[str]] = [[]]
        if count > 1:
            # Below the ports that the system hands out, and not that of another drill.
            port = 2 * random.SystemRandom().randrange(10000, 16000)
            meeting = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
            places = [[*meeting, f"--process_id={index}"] for index in range(count)]
        with self._log.open("w") as log:
            # Each in a session of its own: a Ctrl-C is for the drill alone.
            return [
                subprocess.Popen(
                    [*command, *place],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                )
                for place in places
            ]

    def _watch(self) -> None:
        """Returns when all have ended or have to be ended; meanwhile the target meets its fault."""
        began, first_end = time.monotonic(), math.inf
        while not self._drill.ended.is_set():
            now, codes = time.monotonic(), [process.poll() for process in self._processes]
            if self.hit and not self.seconds and self._target.returncode is not None:
                self.seconds = now - self._struck
            if codes.count(None) < len(codes):
                first_end = min(first_end, now)
            elif not self.hit:
                self._follow(now)
            late = now - first_end > (_SHORT_GRACE if self._alone() else _GRACE)
            if None not in codes or late or now - began > self._drill.limit:
                return
            time.sleep(_POLL)

    def _follow(self, now: float) -> None:
        """Times the phases; in the fault's own it draws a moment, and strikes when that comes."""
        phase, fault, lasted = self._find_phase(), self.fault, self._drill.lasted
        if phase != self._phase:
            if self._phase:
                lasted[self._phase] = now - self._since
            self._phase, self._since = phase, now
            if fault is not None and phase == fault.phase:
                longest = lasted.get(phase, 0.0) / 2**self._tries  # too late before: sooner now
                self._strike_at = now + self._rng.uniform(0, longest)
                self._tries += 1
            elif self._strike_at is not None:  # too late: here, or where the phase comes again
                self._strike_at = now if fault.phase in LEAVING else None
        if self._strike_at is not None and now >= self._strike_at:
            self._strike()

    def _strike(self) -> None:
        """Sends the fault's signals, unless its phase is over and comes again.

        The target is held while we look, so that the phase which the signal meets is certain.
        """
        self._strike_at = None
        self._target.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._target.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        phase = self._find_phase()
        meant = phase == self.fault.phase or self.fault.phase in LEAVING
        if meant and self._target.poll() is None:
            self.hit, self._struck = phase, time.monotonic()
            if self.fault.kind == KILL:
                return self._target.kill()
            everyone = self._rng.random() < 0.5  # some schedulers tell one process, some all
            for process in self._processes if everyone else [self._target]:
                process.terminate()
        self._target.send_signal(signal.SIGCONT)
        if self.hit and self.fault.kind == TWICE:
            time.sleep(self._rng.uniform(0, 0.3))
            self._target.terminate()

    def _find_phase(self) -> str:
        return phase_of(self.workdir, self._drill.config, self._launched)

    def _alone(self) -> bool:
        """Whether the target has ended at once, so that nothing is asked of other processes."""
        return self.hit is not None and (self.fault.kind == KILL or self.hit in LEAVING)

    def _find_problem(self) -> str | None:
        """That the newest checkpoint is whole is for the next start to see, which gets --strict."""
        newest = max(finished_steps(self.workdir / "checkpoints"), default=-1)
        right = [-signal.SIGKILL] if self.fault.kind == KILL else [EXIT_STOPPED]
        if newest == self._drill.config.training.num_steps and self.fault.kind != KILL:
            right.append(0)
        for code in [self._target.returncode] if self._alone() else self.codes:
            if code not in right:
                return f"exit code {code} instead of {right[0]}; {self.last_words()}"
        lines = MetricsFile(self.workdir / "metrics.jsonl").read()
        reached = max((line["step"] for line in lines), default=0)
        if reached > newest and not self._alone():
            return f"step {reached} was reached, but only step {newest} was saved"
        return None

    def last_words(self) -> str:
        """The last line that the processes have written, and where the others are."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return f"{lines[-1][:200] if lines else 'not a word'} (see {self._log})"


class Drill:
    """One drill, and what it has found.

    Attributes:
      lasted: the seconds that each phase took the last time.
      limit: the seconds after which a start is taken to hang.
      ended: once set, every start under way ends.
      hits: the starts that met their fault.
      ends: {name of a disturbed folder: its first difference from the undisturbed one, or None}.
      missed: the faults that never came in their phase.
    """

    def __init__(self, folder: Path, config: ConfigDict, processes=1, devices=None, seed=0):
        """`folder`: gets all run folders; `processes`: of each training, with so many `devices`."""
        self.folder, self.config, self._seed = folder, config, seed
        self.processes, self.devices = processes, devices
        self.lasted: dict[str, float] = {}
        self.limit, self.ended, self._began = math.inf, threading.Event(), time.monotonic()
        self.hits: list[Start] = []
        self.ends: dict[str, str | None] = {}
        self.missed: list[Fault] = []

    def train_undisturbed(self) -> None:
        """Trains what the others are compared with.

        Raises:
          ValueError: the run does not come to its end.
        """
        for old in [self.folder / "undisturbed", *self.folder.glob("disturbed-*")]:
            shutil.rmtree(old, ignore_errors=True)
        (self.folder / "output").mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "config.json", config_lib.to_dict(self.config))
        start = Start(self, self.folder / "undisturbed", None, random.Random()).run()
        if any(start.codes):
            raise ValueError(f"undisturbed, the run ends with {start.codes}; {start.last_words()}")
        self.limit = max(_SHORTEST_LIMIT, _LONGER * (time.monotonic() - self._began))
        self._say(f"undisturbed: {start.workdir}")

    def run(self, amounts: Mapping[str, int], asked: Sequence[str] = (), jobs: int = 1) -> None:
        """Sends so many signals of each kind, in `jobs` trainings at a time.

        Args:
          asked: the phases to hit, in turn; by default all that the run goes through.

        Raises:
          ValueError: the run does not go through a phase that was asked for.
        """
        there = [phase for phase in PHASES if phase in self.lasted]
        if absent := set(asked) - set(there):
            raise ValueError(f"phase {min(absent)!r}: this run has {', '.join(there)}")
        phases = asked or there
        faults = [
            Fault(phases[number % len(phases)], kind)
            for kind, amount in amounts.items()
            for number in range(amount)
        ]
        random.Random(self._seed).shuffle(faults)
        count = -(-len(faults) // _PER_ROUND)
        rounds, numbers = [faults[index::count] for index in range(count)], itertools.count(1)
        with ThreadPoolExecutor(jobs) as pool:
            try:
                while rounds:
                    left = pool.map(self._round, rounds, itertools.islice(numbers, len(rounds)))
                    again = [fault for faults in left for fault in faults]
                    rounds = [again] if again else []
            except BaseException:
                self.ended.set()
                raise

    def _round(self, faults: list[Fault], number: int) -> list[Fault]:
        """One disturbed training, to its end; returns the faults that it ended without."""
        name, rng = f"disturbed-{number}", random.Random(f"{self._seed}, {number}")
        while name not in self.ends:
            faults.sort(key=lambda fault: fault.phase == "finishing")  # that comes last
            fault = faults.pop(0) if faults else None
            start = Start(self, self.folder / name, fault, rng).run()
            if start.hit:
                self.hits.append(start)
                said = start.problem or f"exit codes {start.codes} after {start.seconds:.2f} s"
                meant = "" if start.hit == fault.phase else f" (meant for {fault.phase})"
                self._say(f"{name}: {fault.kind} in {start.hit}{meant}: {said}")
            elif any(start.codes):
                self.ends[name] = f"{name}: exit codes {start.codes}; {start.last_words()}"
            else:
                self.ends[name] = first_difference(self.folder / "undisturbed", start.workdir)
            if fault is not None and start.hit != fault.phase:
                again = dataclasses.replace(fault, misses=fault.misses + 1)
                (faults if fault.misses < _MOST_MISSES else self.missed).append(again)
        self._say(f"{name}: {self.ends[name] or 'equal bit for bit'}")
        return faults

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:7.1f} s  {text}", flush=True)

    def first_problem(self) -> str | None:
        """The first thing that is not as it should be; None where all is."""
        hits = [f"{s.fault.kind} in {s.hit}: {s.problem}" for s in self.hits if s.problem]
        missed = [f"{fault.kind} in {fault.phase}: it never came there" for fault in self.missed]
        return next(filter(None, [*self.ends.values(), *hits, *missed]), None)

    def summary(self) -> list[dict[str, Any]]:
        """What came, and what came of it: an entry for each phase and kind of signal."""
        rows = []
        for phase, kind in itertools.product(PHASES, KINDS):
            hits = [start for start in self.hits if (start.hit, start.fault.kind) == (phase, kind)]
            if hits:
                seconds = [start.seconds for start in hits]
                rows.append(
                    {
                        "phase": phase,
                        "signal": kind,
                        "came": len(hits),
                        "as it should": sum(start.problem is None for start in hits),
                        "median s to exit": round(statistics.median(seconds), 2),
                        "most": round(max(seconds), 2),
                    }
                )
        return rows
