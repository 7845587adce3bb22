"""Faults: which signal, in which phase, at which moment of it."""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

KILL, TERM, TWICE = KINDS = ("SIGKILL", "SIGTERM", "two signals")

# Of the thread that trains, and (three) of the checkpoint store.
PHASES = (
    *("starting", "restoring", "compiling", "stepping", "evaluating", "sampling"),
    *("saving", "writing", "finalising", "finishing"),
)
# A start goes through these but once. 'starting' comes again for moments between two others.
ONCE = ("starting", "restoring", "compiling", "finishing")
# A signal ends the process at once: there is nothing to save.
LEAVING = ("starting", "restoring", "compiling")
# In these a run comes no further, so that they may also happen to one that has reached its end.
WITHOUT_STEPS = (*ONCE, "sampling")


@dataclasses.dataclass
class Wish:
    """A fault that is to happen. `tries`: how often it came too late or not at all."""

    phase: str
    kind: str
    tries: int = 0


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault as a child gets it.

    Attributes:
      phase, kind: what and where.
      occurrence: of the phase in this start, from 1.
      delay: seconds after the phase began.
      gap: seconds between two signals.
      process: which one of several is hit.
      everyone: whether the others get a SIGTERM at the same time.
    """

    phase: str
    kind: str
    occurrence: int
    delay: float
    gap: float
    process: int
    everyone: bool

    def to_json(self) -> dict[str, Any]:
        """As `Fault(**values)` takes it."""
        return dataclasses.asdict(self)


class Durations:
    """How long each phase took in the starts seen so far.

    Starts of three kinds are kept apart, since they differ: those that compiled all (cold), those
    that began anew, those that resumed.
    """

    def __init__(self, saved: Iterable[Sequence[Any]] = ()):
        """`saved`: what `to_json` gave."""
        self._seconds: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
        for phase, kind, seconds in saved:
            self._seconds[phase, kind].append(seconds)

    def add(self, phases: Iterable[tuple[str, float]], *, resumed: bool, cold: bool) -> None:
        """(phase, seconds) of what came to its end in one start."""
        for phase, seconds in phases:
            self._seconds[phase, _kind(resumed, cold)].append(seconds)

    def to_json(self) -> list[list[Any]]:
        """[phase, kind of start, seconds] of each occurrence."""
        return [[*key, seconds] for key, found in self._seconds.items() for seconds in found]

    def counts(self) -> dict[str, int]:
        """How often each phase came."""
        found: dict[str, int] = collections.Counter()
        for (phase, _), seconds in self._seconds.items():
            found[phase] += len(seconds)
        return dict(found)

    def moment(self, rng: random.Random, phase: str, *, resumed: bool, cold: bool) -> float:
        """Seconds after its begin of a moment drawn uniformly from all recorded time of a phase.

        Of a start of this kind; while none is known, of one that is most like it.
        """
        kinds = (_kind(resumed, cold), _kind(not resumed, cold), "cold")
        found = next(filter(None, (self._seconds.get((phase, kind)) for kind in kinds)), None)
        if found is None:
            return 0.0
        (whole,) = rng.choices(found, weights=[seconds + 1e-9 for seconds in found])
        return rng.uniform(0.0, whole)


def _kind(resumed: bool, cold: bool) -> str:
    return "cold" if cold else "resumed" if resumed else "fresh"


def wishes(
    amounts: Mapping[str, int], phases: Sequence[str], rng: random.Random
) -> list[list[Wish]]:
    """The faults of each round in the order they are to come; `amounts`: of each kind.

    A kind's faults go round the phases; a round holds at most `PER_ROUND` of all.
    """
    every = []
    for kind, amount in amounts.items():
        every += [Wish(phases[number % len(phases)], kind) for number in range(amount)]
    rng.shuffle(every)
    num_rounds = -(-len(every) // PER_ROUND)
    return [in_order(every[number::num_rounds]) for number in range(num_rounds)]


PER_ROUND = 12


def in_order(some: Iterable[Wish]) -> list[Wish]:
    """As given, but the end of a run comes last."""
    return sorted(some, key=lambda wish: wish.phase == "finishing")


def aimed(
    wish: Wish,
    durations: Durations,
    rng: random.Random,
    *,
    resumed: bool,
    cold: bool,
    occurrences: float,
    num_processes: int,
) -> Fault:
    """The fault for one start; `occurrences`: the last one of the phase that it may choose."""
    occurrence = 1
    if wish.phase not in ONCE:
        occurrence += rng.randrange(max(1, round(occurrences)))
    finalising = wish.phase == "finalising"  # process 0 does it
    return Fault(
        phase=wish.phase,
        kind=wish.kind,
        occurrence=occurrence,
        delay=durations.moment(rng, wish.phase, resumed=resumed, cold=cold),
        gap=rng.choice((0.0, rng.uniform(0.0, 0.3))),
        process=0 if finalising else rng.randrange(num_processes),
        everyone=wish.kind != KILL and rng.random() < 0.5,
    )
