"""What a person sees of an evaluation: how far it is, and what a chat model's answers are like."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from math import nan
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

# f(what is done, how many are so far, how many in all); it may raise to end the evaluation.
Told = Callable[[str, int, int], None]


@contextlib.contextmanager
def bar(console: Console) -> Iterator[Told]:
    """A line on the console for each kind of work; gives what moves it, called first with 0."""
    name = TextColumn("{task.description}", markup=False)
    with Progress(name, BarColumn(), TimeRemainingColumn(), console=console) as progress:

        def told(what: str, done: int, count: int) -> None:
            if done == 0:
                progress.add_task(what, total=count)
            progress.update(progress.task_ids[-1], completed=done)

        yield told


def table_of_answers(found: Mapping[str, float]) -> Table:
    """The numbers of `evaluation.answers.measure_answers`."""
    title = f"answers to {found['conversations']} held-out conversations"
    table = Table(title, "greedy", "sampled")
    for name in dict.fromkeys(key.partition("/")[2] for key in found if "/" in key):
        both = (found.get(f"{how}/{name}", nan) for how in ("greedy", "sampled"))
        table.add_row(name, *(f"{value:.3f}" for value in both))
    return table


def table_of_grades(found: Mapping[str, Any], published: Mapping[str, float]) -> Table:
    """The means of `evaluation.mt_bench.judge_answers`, and the published ones by model."""
    caption = (
        "Published ones were judged by GPT-4. Grades of different judges cannot be compared, and "
        "no model should judge itself."
    )
    title = f"MT-Bench, {found['graded']} grades by {found['judge']}"
    table = Table("of 1 to 10", "grade", title=title, title_justify="left", caption=caption)
    means = {what: value for what, value in found.items() if isinstance(value, float)}
    rows = {what.replace("_", " "): value for what, value in means.items()}
    for what, value in (
        rows | {f"published: {m}": value for m, value in published.items()}
    ).items():
        table.add_row(what, f"{value:.2f}")
    return table
