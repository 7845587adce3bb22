"""A drill: the undisturbed training, then rounds of signals and restarts, each one compared."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from stablelm_jax.checkpoint.names import finished_steps
from stablelm_jax.drilling.comparison import first_difference, unaccounted
from stablelm_jax.drilling.phases import LEAVING, PHASES, phase_of
from stablelm_jax.run.metrics import MetricsFile
from stablelm_jax.run.signals import EXIT_STOPPED

KINDS = (signal.SIGKILL, signal.SIGTERM)
_POLL = 0.002  # seconds; some phases last for 20 ms
_GRACE = 60.0  # seconds that the other processes get after the first one has ended
_MOST_MISSES = 4  # of a fault, after which the drill has failed
_PER_ROUND = 12  # faults


@dataclasses.dataclass
class Fault:
    """A signal that a training is to meet. `misses`: starts in which it did not come as meant."""

    phase: str
    signal: signal.Signals
    misses: int = 0


class Start:
    """One start of the training in `workdir`, which is to meet `fault`."""

    def __init__(self, drill: Drill, workdir: Path, fault: Fault | None):
        self.workdir, self.fault, self._drill = workdir, fault, drill
        self.hit: str | None = None  # the phase in which the signal came
        self._strike_at = math.inf

    def run(self) -> Start:
        """Returns when all processes have ended."""
        self.launched, self._phase, self._since = time.time_ns(), "", time.monotonic()
        self._log = self._drill.folder / "output" / f"{self.workdir.name}-{self.launched}.txt"
        self._processes = self._launch()
        self._target = self._drill.rng.choice(self._processes)
        try:
            self._watch()
        finally:
            for process in self._processes:
                process.kill()
            self.codes = [process.wait() for process in self._processes]
        self.seconds = time.monotonic() - self._since  # from the signal, where it came
        if not self.hit:
            self._drill.lasted[self._phase] = self.seconds
        return self

    def _launch(self) -> list[subprocess.Popen]:
        drill, environment = self._drill, dict(os.environ)
        if self.fault is not None and self.fault.phase == "compiling":
            environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        if drill.devices is not None:
            environment["JAX_NUM_CPU_DEVICES"] = str(drill.devices)
        command = [sys.executable, "-m", "stablelm_jax.train", f"--workdir={self.workdir}"]
        command += [*drill.config_flags, "--strict"]
        commands = [command]
        if drill.processes > 1:
            # Below the ports that the system hands out, and not that of another drill.
            port = 2 * random.SystemRandom().randrange(10000, 16000)
            command += [f"--coordinator=127.0.0.1:{port}", f"--num_processes={drill.processes}"]
            commands = [[*command, f"--process_id={index}"] for index in range(drill.processes)]
        with self._log.open("wb") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            # Each in a session of its own: a Ctrl-C is for the drill alone.
            options = {"env": environment, "start_new_session": True, **streams}
            return [subprocess.Popen(command, **options) for command in commands]

    def _watch(self) -> None:
        """Returns when all have ended or have to be ended; meanwhile the target meets its fault."""
        now = time.monotonic()
        deadline = now + self._drill.limit
        while now < deadline and any(process.poll() is None for process in self._asked()):
            now = time.monotonic()
            if any(process.poll() is not None for process in self._processes):
                deadline = min(deadline, now + _GRACE)
            elif not self.hit:
                self._follow(now)
            time.sleep(_POLL)

    def _follow(self, now: float) -> None:
        """Times the phases; in the fault's own it draws a moment, and strikes when that comes."""
        phase, fault, lasted = self._find_phase(), self.fault, self._drill.lasted
        if phase != self._phase:
            lasted[self._phase] = now - self._since
            self._phase, self._since = phase, now
            if fault is not None and phase == fault.phase:
                longest = lasted.get(phase, 0.0) / 2**fault.misses  # too late before: sooner now
                self._strike_at = now + self._drill.rng.uniform(0, longest)
            elif self._strike_at < math.inf:  # too late: here, or where the phase comes again
                self._strike_at = now if fault.phase in LEAVING else math.inf
        if now >= self._strike_at:
            self._strike()

    def _strike(self) -> None:
        """Sends the fault's signal, unless its phase is over and comes again.

        The target is held while we look, so that the phase which the signal meets is certain.
        """
        self._strike_at, rng, kind = math.inf, self._drill.rng, self.fault.signal
        self._target.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._target.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        phase = self._find_phase()
        meant = phase == self.fault.phase or self.fault.phase in LEAVING
        if meant and self._target.poll() is None:
            self.hit, self._since = phase, time.monotonic()
            # Some schedulers tell one process, some tell all, and some tell it twice.
            everyone = kind == signal.SIGTERM and rng.random() < 0.5
            for process in self._processes if everyone else [self._target]:
                process.send_signal(kind)
        self._target.send_signal(signal.SIGCONT)
        if self.hit and kind == signal.SIGTERM and rng.random() < 0.25:
            time.sleep(rng.uniform(0, 0.3))
            self._target.terminate()

    def _find_phase(self) -> str:
        return phase_of(self.workdir, self._drill.config, self.launched)

    def _asked(self) -> list[subprocess.Popen]:
        """The processes that have to end as they should: all, or the one that ended at once.

        The others would wait for that one without end: a scheduler ends them, so the drill does.
        """
        alone = self.hit and (self.fault.signal == signal.SIGKILL or self.hit in LEAVING)
        return [self._target] if alone else self._processes

    def find_problem(self) -> str | None:
        """What is not as it should be after the signal; None where all is.

        That the newest checkpoint is whole is for the next start to see, which gets --strict.
        """
        newest = max(finished_steps(self.workdir / "checkpoints"), default=-1)
        done = newest == self._drill.config.training.num_steps
        killed = self.fault.signal == signal.SIGKILL
        right = [-signal.SIGKILL] if killed else [EXIT_STOPPED, 0] if done else [EXIT_STOPPED]
        for process in self._asked():
            if process.returncode not in right:
                return f"exit code {process.returncode} instead of {right[0]}; {self.last_words()}"
        lines = MetricsFile(self.workdir / "metrics.jsonl").read()
        reached = max((line["step"] for line in lines), default=0)
        if reached > newest and not killed and self.hit not in LEAVING:
            return f"step {reached} was reached, but only step {newest} was saved"
        return None

    def last_words(self) -> str:
        """The last line that the processes have written, and where the others are."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return f"{lines[-1][:200] if lines else 'not a word'} (see {self._log})"


class Drill:
    """One drill; `problems` is what is not as it should be, `hits` the starts that met a fault."""

    def __init__(self, folder: Path, config: ConfigDict, config_flags: Sequence[str] = ()):
        """`folder` gets all run folders; `config_flags` give a training process this config."""
        self.folder, self.config, self.config_flags = folder, config, config_flags
        self.processes, self.devices = 1, None  # of each training, of each process
        self.rng = random.Random(0)
        self.lasted: dict[str, float] = {}  # seconds that each phase took the last time
        self.limit = math.inf  # seconds after which a start is taken to hang
        self.runs, self._began = 0, time.monotonic()
        self.hits: list[Start] = []
        self.problems: list[str] = []

    def train_undisturbed(self) -> None:
        """Trains what the others are compared with; ValueError: it does not come to its end."""
        for old in [self.folder / "undisturbed", *self.folder.glob("disturbed-*")]:
            shutil.rmtree(old, ignore_errors=True)
        (self.folder / "output").mkdir(parents=True, exist_ok=True)
        start = Start(self, self.folder / "undisturbed", None).run()
        if any(start.codes):
            raise ValueError(f"undisturbed, the run ends with {start.codes}; {start.last_words()}")
        self.limit = 300 + 20 * (time.monotonic() - self._began)
        self._tell("undisturbed", None, f"in {start.workdir}")

    def run(self, kills: int, signals: int, asked: Sequence[str] = ()) -> None:
        """Sends so many SIGKILLs and SIGTERMs, and trains each disturbed run to its end.

        `asked`: the phases to hit, in turn; by default all that the run goes through.
        ValueError: it does not go through one of them.
        """
        there = [phase for phase in PHASES if phase in self.lasted]
        if absent := set(asked) - set(there):
            raise ValueError(f"phase {min(absent)!r}: this run has {', '.join(there)}")
        faults = [
            Fault(phase, kind)
            for kind, amount in zip(KINDS, (kills, signals))
            for phase in itertools.islice(itertools.cycle(asked or there), amount)
        ]
        self.rng.shuffle(faults)
        while faults:
            faults = self._round(faults[:_PER_ROUND]) + faults[_PER_ROUND:]

    def _round(self, faults: list[Fault]) -> list[Fault]:
        """One disturbed training, to its end; returns the faults that it ended without."""
        self.runs += 1
        name, ended, began = f"disturbed-{self.runs}", False, None
        while not ended:
            # What comes at the end is for last, a stop after a kill: then the run is complete.
            faults.sort(key=lambda fault: fault.phase == "finishing" and fault.signal)
            fault = faults.pop(0) if faults else None
            start = Start(self, self.folder / name, fault).run()
            ended = start.hit is None
            if began is None and (start.workdir / "goodput.json").exists():
                began = start.launched / 1e9  # one that was killed sooner has left nothing
            if start.hit:
                self.hits.append(start)
                what = f"{name}: {fault.signal.name} in {start.hit}"
                fine = f"exit codes {start.codes} after {start.seconds:.2f} s"
                self._tell(what, start.find_problem(), fine)
            if fault is not None and start.hit != fault.phase:
                fault.misses += 1
                if fault.misses <= _MOST_MISSES:
                    faults.append(fault)
                else:
                    self._tell(f"{fault.signal.name} in {fault.phase}", "it never came there")
        if any(start.codes):
            difference = f"exit codes {start.codes}; {start.last_words()}"
        else:
            difference = first_difference(self.folder / "undisturbed", start.workdir)
            difference = difference or unaccounted(start.workdir, began)
        self._tell(name, difference, "equal bit for bit")
        return faults

    def _tell(self, what: str, problem: str | None, fine: str = "") -> None:
        if problem:
            self.problems.append(f"{what}: {problem}")
        print(f"{time.monotonic() - self._began:7.1f} s  {what}: {problem or fine}", flush=True)
