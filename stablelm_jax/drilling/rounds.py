"""A drill: the undisturbed training, then rounds of faults and restarts, each one compared."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from stablelm_jax import config as config_lib
from stablelm_jax.drilling.comparison import first_difference
from stablelm_jax.drilling.plan import (
    ONCE,
    PHASES,
    WITHOUT_STEPS,
    Durations,
    Fault,
    Wish,
    aimed,
    in_order,
    wishes,
)
from stablelm_jax.drilling.starts import Ended, Setup, run_start
from stablelm_jax.drilling.verdict import newest_step, problem
from stablelm_jax.storage.files import write_json
from stablelm_jax.training.setup import fingerprints

_TRIES = 4  # of a fault that came too late for its phase, or not at all
_LONGER = 20  # times an undisturbed run: a start that takes so long hangs
_SHORTEST_LIMIT = 300.0  # seconds


class DrillError(ValueError):
    """The drill cannot be held."""


@dataclasses.dataclass(frozen=True)
class Injected:
    """One fault that happened.

    Attributes:
      round: in which it was, from 1.
      wanted, phase: the phase it was meant for, and the one that it met.
      kind: one of `plan.KINDS`.
      seconds: from the signal to the exit.
      problem: why it did not end as it should; None where it did.
    """

    round: int
    wanted: str
    phase: str
    kind: str
    seconds: float | None
    problem: str | None


@dataclasses.dataclass
class Results:
    """What a drill found. `differences`: by round, None where the end is equal."""

    injected: list[Injected] = dataclasses.field(default_factory=list)
    differences: dict[int, str | None] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)

    def first_problem(self) -> str | None:
        """The first thing that is not as it should be."""
        wrong = [*self.problems, *(f"{i.kind} in {i.phase}: {i.problem}" for i in self.injected
                                   if i.problem)]  # fmt: skip
        return next(filter(None, [*self.differences.values(), *wrong]), None)


class Drill:
    """Holds a drill in the folder of `setup`. Interrupted, it begins its rounds anew."""

    def __init__(self, config: ConfigDict, setup: Setup, seed: int, say: Callable[[str], None]):
        """`say`: gets a line for each start."""
        self._config, self._setup, self._say = config, setup, say
        self._rng = random.Random(seed)
        self._last = config.training.num_steps
        self._durations = Durations()
        self._known = setup.folder / "undisturbed.json"
        self.undisturbed = setup.folder / "undisturbed"
        self.results = Results()

    def train_undisturbed(self) -> None:
        """Unless the folder holds it, of the same config, code and data.

        Raises:
          DrillError: it does not come to its end.
          ValueError: config and data do not fit.
        """
        setup, folder = self._setup, self._setup.folder
        prints = fingerprints(self._config)
        prints |= {"processes": setup.processes, "devices": setup.devices}
        folder.mkdir(parents=True, exist_ok=True)
        for old in [folder / "starts", *folder.glob("disturbed-*")]:
            shutil.rmtree(old, ignore_errors=True)
        found = json.loads(self._known.read_text()) if self._known.exists() else {}
        if found.get("fingerprints") != prints:
            found = self._train_anew(prints)
        self._durations = Durations(found["durations"])
        self._counts = self._durations.counts()
        limit = max(_SHORTEST_LIMIT, _LONGER * found["seconds"])
        self._setup = dataclasses.replace(setup, limit=limit)
        self._say(f"undisturbed: {found['seconds']:.1f} s, {self.undisturbed}")

    def _train_anew(self, prints: Mapping[str, Any]) -> dict[str, Any]:
        self._known.unlink(missing_ok=True)
        shutil.rmtree(self.undisturbed, ignore_errors=True)
        write_json(self._setup.config, config_lib.to_dict(self._config))
        began = time.monotonic()
        # Nothing compiled before is used: this is the run that tells how long compiling takes.
        shutil.rmtree(self._setup.folder / "compiled", ignore_errors=True)
        ended = run_start(self._setup, self.undisturbed, None)
        if any(ended.codes):
            raise DrillError(f"undisturbed, the run ends with {ended.codes}; {ended.last_words()}")
        self._durations.add(ended.phases, resumed=False, cold=True)
        found = {
            "fingerprints": prints,
            "seconds": time.monotonic() - began,
            "durations": self._durations.to_json(),
        }
        write_json(self._known, found)
        return found

    def phases(self, asked: Sequence[str]) -> list[str]:
        """The phases to hit: those asked for, by default all that this run goes through.

        Raises:
          DrillError: the run does not go through one of them.
        """
        there = [phase for phase in PHASES if phase in self._counts]
        for phase in asked:
            if phase not in there:
                raise DrillError(f"phase {phase!r}: this run has {', '.join(there)}")
        return list(asked) or there

    def run(self, amounts: Mapping[str, int], phases: Sequence[str], jobs: int = 1) -> None:
        """Injects that many faults of each kind; fills `results`. `jobs`: rounds at a time."""
        numbers, waiting = itertools.count(1), wishes(amounts, phases, self._rng)
        with ThreadPoolExecutor(jobs) as pool:
            try:
                while waiting:
                    rounds = [pool.submit(self._round, next(numbers), each) for each in waiting]
                    left = [wish for each in rounds for wish in each.result()]
                    waiting = [in_order(left)] if left else []
            except BaseException:
                self._setup.ended.set()
                raise

    def _round(self, number: int, queue: list[Wish]) -> list[Wish]:
        """One disturbed training; returns the faults that it ended without."""
        workdir = self._setup.folder / f"disturbed-{number}"
        finished, later = False, []
        while queue or not finished:
            wish = queue.pop(0) if queue else None
            if finished and wish.phase not in WITHOUT_STEPS:
                later.append(wish)
                continue
            ended, again = self._start(number, workdir, wish, queue)
            finished = not any(ended.codes)
            if again is not None and wish.tries < _TRIES:
                queue = in_order([*queue, again])
            elif again is not None:
                self.results.problems.append(f"{wish.kind} in {wish.phase}: could not be injected")
            if ended.hit is None and not finished:
                self._fail(f"round {number}: exit codes {ended.codes}; {ended.last_words()}")
                self.results.differences[number] = f"{workdir}: did not come to its end"
                return []
        self.results.differences[number] = first_difference(self.undisturbed, workdir)
        said = self.results.differences[number] or "equal bit for bit"
        self._say(f"round {number}: {said}")
        return later

    def _start(
        self, number: int, workdir: Path, wish: Wish | None, queue: list[Wish]
    ) -> tuple[Ended, Wish | None]:
        """One start; returns how it ended, and the fault if it is to come again."""
        before = newest_step(workdir)
        fault = None if wish is None else self._aim(wish, queue, before)
        cold = wish is not None and wish.phase == "compiling"
        ended = run_start(self._setup, workdir, fault, cold=cold)
        self._durations.add(ended.phases, resumed=before is not None, cold=cold)
        if fault is None or ended.hit is None:
            self._say(f"round {number}: exit codes {ended.codes} at step {newest_step(workdir)}")
            return ended, None if wish is None else dataclasses.replace(wish, tries=wish.tries + 1)
        wrong = problem(fault, ended, workdir, before, self._last)
        hit = ended.hit["phase"]
        found = Injected(number, wish.phase, hit, wish.kind, ended.seconds, wrong)
        self.results.injected.append(found)
        self._say(_said(found, ended.codes, newest_step(workdir)))
        missed = hit != wish.phase
        return ended, dataclasses.replace(wish, tries=wish.tries + 1) if missed else None

    def _aim(self, wish: Wish, queue: Sequence[Wish], before: int | None) -> Fault:
        share = 1 - (before or 0) / self._last
        stepping = sum(other.phase not in ONCE for other in queue) + 1
        occurrences = self._counts[wish.phase] / self._setup.processes * share / stepping
        occurrences /= 2  # the run is not to end before its faults: that costs another round
        return aimed(
            wish,
            self._durations,
            self._rng,
            resumed=before is not None,
            cold=wish.phase == "compiling",
            occurrences=1 if wish.tries else occurrences,
            num_processes=self._setup.processes,
        )

    def _fail(self, text: str) -> None:
        self.results.problems.append(text)
        self._say(text)


def _said(found: Injected, codes: Sequence[int], newest: int | None) -> str:
    meant = "" if found.phase == found.wanted else f" (meant for {found.wanted})"
    exits = f"exit {', '.join(map(str, codes))}"
    end = found.problem or ("killed" if found.kind == "SIGKILL" else exits)
    kept = "nothing saved yet" if newest is None else f"global_step{newest} is whole"
    return (
        f"round {found.round}: {found.kind} in {found.phase}{meant}: {end} "
        f"after {found.seconds or 0:.2f} s; {kept}"
    )
