"""What a drill found, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from stablelm_jax.drilling.plan import KILL, KINDS, PHASES
from stablelm_jax.drilling.rounds import Injected, Results


def summary(results: Results) -> list[dict[str, Any]]:
    """One entry for each phase and kind of fault that happened.

    {"phase", "kind", "injected", "as_it_should", "equal", "median_seconds", "max_seconds"}; the
    seconds are from the signal to the exit, None for SIGKILL.
    """
    rows = []
    for phase in PHASES:
        for kind in KINDS:
            some = [i for i in results.injected if (i.phase, i.kind) == (phase, kind)]
            if some:
                rows.append(_row(phase, kind, some, results))
    return rows


def _row(phase: str, kind: str, some: Sequence[Injected], results: Results) -> dict[str, Any]:
    seconds = [i.seconds for i in some if i.seconds is not None and kind != KILL]
    return {
        "phase": phase,
        "kind": kind,
        "injected": len(some),
        "as_it_should": sum(i.problem is None for i in some),
        "equal": all(results.differences.get(i.round, "") is None for i in some),
        "median_seconds": statistics.median(seconds) if seconds else None,
        "max_seconds": max(seconds) if seconds else None,
    }


def table(results: Results) -> Table:
    """For a person."""
    ends = list(results.differences.values())
    equal = sum(end is None for end in ends)
    title = f"{len(results.injected)} faults; {equal} of {len(ends)} ends equal bit for bit"
    drawn = Table(title=title, title_justify="left")
    for column in ("phase", "fault"):
        drawn.add_column(column)
    for column in ("injected", "as it should", "end equal", "median s to exit", "max s"):
        drawn.add_column(column, justify="right")
    for row in summary(results):
        drawn.add_row(
            row["phase"],
            row["kind"],
            str(row["injected"]),
            str(row["as_it_should"]),
            "yes" if row["equal"] else "NO",
            *(_seconds(row[key]) for key in ("median_seconds", "max_seconds")),
        )
    return drawn


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def to_json(results: Results, asked: dict[str, Any]) -> dict[str, Any]:
    """The content of drill.json; `asked`: what the drill was to do."""
    return {
        "asked": asked,
        "summary": summary(results),
        "faults": [dataclasses.asdict(injected) for injected in results.injected],
        "differences": {str(key): value for key, value in results.differences.items()},
        "problems": results.problems,
        "first_problem": results.first_problem(),
    }
