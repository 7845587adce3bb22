"""One start of a training: its processes, the fault that meets them, how they end."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stablelm_jax.drilling import resolved
from stablelm_jax.drilling.plan import KILL, LEAVING, Fault
from stablelm_jax.run.signals import EXIT_STOPPED

CHILD = "stablelm_jax.drilling.child"
_POLL = 0.005  # seconds
_ERROR = re.compile(r"error: |F\d{4} |Fatal|\w+(Error|Exception): ")  # ours, abseil's, Python's
# Processes that wait for one that left at once do so for ever; a scheduler ends them.
_GRACE_AFTER_LEAVING = 3.0
_GRACE = 60.0
_PACKAGE = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all starts of a drill share.

    Attributes:
      folder: of the drill.
      processes: of each training.
      devices: CPU devices of each process; None: what the machine has.
      child: the module that trains.
      limit: seconds after which a start hangs.
      ended: set, it ends every start under way.
    """

    folder: Path
    processes: int = 1
    devices: int | None = None
    child: str = CHILD
    limit: float = 3600.0
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)

    @property
    def config(self) -> Path:
        """Where the resolved config lies."""
        return self.folder / "config.json"


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a start came to its end.

    Attributes:
      codes: exit code of each process, negative for a signal.
      ended_by_us: the processes that had to be ended because another was gone.
      hit: what the fault met, {"phase", "phases", "time"}; None where it never came.
      seconds: from the signal to the end of the process that it met.
      phases: (phase, seconds) of each occurrence that came to its end.
      hung: whether the limit was passed.
      logs: what each process said.
    """

    codes: list[int]
    ended_by_us: set[int]
    hit: dict[str, Any] | None
    seconds: float | None
    phases: list[tuple[str, float]]
    hung: bool
    logs: list[Path]

    def last_words(self) -> str:
        """The error that a process which failed has written, else its last line."""
        for code, log in zip(self.codes, self.logs):
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            if code not in (0, EXIT_STOPPED) and lines:
                errors = [line for line in lines if _ERROR.match(line)]
                return f"{[*errors, lines[-1]][0][:200]} (see {log})"
        return f"see {self.logs[0]}"


class Interrupted(Exception):
    """The drill was told to end."""


def run_start(setup: Setup, workdir: Path, fault: Fault | None, *, cold: bool = False) -> Ended:
    """Trains in `workdir` until it ends, by itself or by the fault.

    `cold`: with an empty compilation cache of its own, so that something is compiled.

    Raises:
      Interrupted: `setup.ended` was set; no process is left.
    """
    records = _next_folder(setup.folder / "starts")
    with _compilation_cache(setup.folder, records if cold else None) as cache:
        processes, logs = _launch(setup, workdir, fault, records, cache)
        watched = _Watch(processes, fault, records, setup)
        try:
            watched.wait()
        finally:
            watched.end_all()
    return Ended(
        codes=[process.returncode for process in processes],
        ended_by_us=watched.ended_by_us,
        hit=watched.hit,
        seconds=watched.seconds,
        phases=_phases(records),
        hung=watched.hung,
        logs=logs,
    )


def _next_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1 + len(list(folder.iterdir()))):
        with contextlib.suppress(FileExistsError):  # another round's
            path = folder / f"{number:04d}"
            path.mkdir()
            return path


@contextlib.contextmanager
def _compilation_cache(folder: Path, own: Path | None) -> Iterator[Path]:
    if own is None:
        yield folder / "compiled"
        return
    try:
        yield own / "compiled"
    finally:
        shutil.rmtree(own / "compiled", ignore_errors=True)


def _launch(
    setup: Setup, workdir: Path, fault: Fault | None, records: Path, cache: Path
) -> tuple[list[subprocess.Popen], list[Path]]:
    meeting = []
    if setup.processes > 1:
        meeting = [f"--coordinator=127.0.0.1:{_free_port()}", f"--num_processes={setup.processes}"]
    processes, logs = [], []
    for index in range(setup.processes):
        mine = fault is not None and fault.process == index
        plan = records / f"plan-{index}.json"
        values = {"records": str(records), "process": index}
        values |= {"checkpoints": str(workdir / "checkpoints")}
        plan.write_text(json.dumps(values | {"fault": fault.to_json() if mine else None}))
        flags = [f"--config={resolved.__file__}:{setup.config}", f"--workdir={workdir}"]
        place = [*meeting, f"--process_id={index}"] if meeting else []
        logs.append(records / f"output-{index}.txt")
        with logs[-1].open("w") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", setup.child, str(plan), *flags, *place],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=_environment(setup, cache),
                    start_new_session=True,  # a Ctrl-C is for the drill alone
                )
            )
    return processes, logs


def _environment(setup: Setup, cache: Path) -> dict[str, str]:
    path = os.pathsep.join([str(_PACKAGE), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    devices = {} if setup.devices is None else {"JAX_NUM_CPU_DEVICES": str(setup.devices)}
    return {
        **os.environ,
        **devices,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def _free_port() -> int:
    """A port that is free, and the one after it, where the processes meet, as well."""
    while True:
        with socket.socket() as one, socket.socket() as next_one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                next_one.bind(("127.0.0.1", port + 1))
                return port


class _Watch:
    """Waits for the processes of a start as a scheduler would."""

    def __init__(
        self, processes: list[subprocess.Popen], fault: Fault | None, records: Path, setup: Setup
    ):
        self._processes, self._fault, self._setup = processes, fault, setup
        self._hit_file = records / f"hit-{fault.process if fault else 0}.json"
        self.ended_by_us: set[int] = set()
        self.hit: dict[str, Any] | None = None
        self.seconds: float | None = None
        self.hung = False

    def wait(self) -> None:
        """Returns when all processes have ended."""
        began, first_end = time.monotonic(), None
        while any(running := [process.poll() is None for process in self._processes]):
            now = time.monotonic()
            self._look_for_hit()
            if not all(running):
                first_end = first_end or now
                if now - first_end > self._grace():
                    self.end_all()
            if self._setup.ended.is_set():
                raise Interrupted
            if now - began > self._setup.limit:
                self.hung = True
                self.end_all()
            time.sleep(_POLL)
        self._look_for_hit()

    def _look_for_hit(self) -> None:
        if self._fault is None:
            return
        if self.hit is None and self._hit_file.exists():
            self.hit = json.loads(self._hit_file.read_text())
            if self._fault.kind != KILL and self._fault.everyone:
                for index, process in enumerate(self._processes):
                    if index != self._fault.process and process.poll() is None:
                        process.send_signal(signal.SIGTERM)
        if self.hit is not None and self.seconds is None:
            if self._processes[self._fault.process].poll() is not None:
                self.seconds = time.time() - self.hit["time"]

    def _grace(self) -> float:
        """Seconds that the others get after the first process has ended."""
        if self.hit is None:
            return _GRACE
        if self._fault.kind == KILL:
            return 0.0
        return _GRACE_AFTER_LEAVING if self.hit["phase"] in LEAVING else _GRACE

    def end_all(self) -> None:
        """Kills what still runs."""
        for index, process in enumerate(self._processes):
            if process.poll() is None:
                self.ended_by_us.add(index)
                process.kill()
                process.wait()


def _phases(records: Path) -> list[tuple[str, float]]:
    found = []
    for path in sorted(records.glob("phases-*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if text.endswith("\n"):
                line = json.loads(text)
                found.append((line["phase"], line["seconds"]))
    return found
