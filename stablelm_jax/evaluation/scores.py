"""Task scores for a person, beside the scores published for Stable LM 2, and as JSON."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

_LIBRARIES = ("stablelm_jax", "lm_eval", "jax", "datasets")
_NOT_SHARES = ("perplexity", "byte", "bits")  # metrics that are no share of the items
# What lm-eval's class `dummy` gets, which says "lol" to every prompt: {(task, metric): percent}.
FLOORS = {("ifeval", f"prompt_level_{kind}_acc"): 11.46 for kind in ("strict", "loose")}
FLOORS |= {("ifeval", f"inst_level_{kind}_acc"): 22.90 for kind in ("strict", "loose")}


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """One number.

    Attributes:
      asked: the name that it was asked for by, which may be a group's.
      how: lm-eval's filter of the answers; 'none' where there is one way to read them.
      shots: examples in the prompt; None for a group of tasks that differ in it.
      stderr: standard error; None where there is none.
      items: how many there were; None for a group.
      version: the task's version in lm-eval.
      note: in what the data differs from lm-eval's own.
      untouched, untouched_items: the score of the items that do not stand in the training text,
        and how many these are; None where that is not known, or where none stands there.
    """

    asked: str
    task: str
    metric: str
    how: str
    shots: int | None
    value: float
    stderr: float | None
    items: int | None
    version: str
    note: str = ""
    untouched: float | None = None
    untouched_items: int | None = None

    @property
    def key(self) -> str:
        """TASK/METRIC, and /HOW where answers are read in several ways."""
        return f"{self.task}/{self.metric}" + ("" if self.how == "none" else f"/{self.how}")

    @property
    def is_detail(self) -> bool:
        """One subject of MMLU, whose mean is a score of its own."""
        return self.asked != self.task and self.task.startswith("mmlu_")


@functools.cache
def published_scores() -> list[dict[str, Any]]:
    """In percent: "group" of tasks, "task", "metric", "shots", "how", "source", "scores" by model.

    Of two metrics of a task the first is that of the group's published mean.
    """
    suites = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return [
        {"group": suite["group"], "source": suite["source"], "how": "none", **row}
        for suite in suites
        for row in suite["scores"]
    ]


def published_score(score: TaskScore, model: str) -> tuple[float, str] | None:
    """What a published model got for the same, in percent or the metric's unit, and the source.

    Two suites may know the same task: that of the group by which it was asked for goes first.
    """
    what = score.task, score.metric, score.shots, score.how
    for row in sorted(published_scores(), key=lambda row: row["group"] != score.asked):
        known = row["task"], row["metric"], row["shots"], row["how"]
        if known == what and model in row["scores"]:
            return row["scores"][model], row["source"]
    return None


def published_mt_bench() -> dict[str, float]:
    """The mean grades of MT-Bench that were published, by model; GPT-4 was the judge."""
    (row,) = (row for row in published_scores() if row["task"] == "mt_bench")
    return row["scores"]


def published_metric(task: str) -> str | None:
    """The metric that the published suites give first for a task; None for other tasks."""
    return next((row["metric"] for row in published_scores() if row["task"] == task), None)


def shown_scores(scores: Sequence[TaskScore]) -> list[TaskScore]:
    """Without MMLU's subjects; of a task with a published metric that one, else all."""
    return [s for s in scores if not s.is_detail and published_metric(s.task) in (None, s.metric)]


def table_of_scores(scores: Sequence[TaskScore], model: str, title: str = "tasks") -> Table:
    """Task, metric, examples, ours with its standard error, floor, and the score of `model`.

    Shares are in percent.
    """
    shown = shown_scores(scores)
    beside = {"floor": [FLOORS.get((score.task, score.metric)) for score in shown]}
    beside[model] = [(published_score(score, model) or (None,))[0] for score in shown]
    beside = {name: values for name, values in beside.items() if any(values)}
    if any(score.untouched_items for score in shown):
        beside["untouched"] = [score.untouched and score.untouched * 100 for score in shown]
    notes = {score.task: score.note for score in shown if score.note}
    for score in shown:
        if score.untouched_items:
            left = (
                f"untouched: {score.untouched_items:,} items that the training text does not hold"
            )
            notes[score.task] = "; ".join(filter(None, [notes.get(score.task), left]))
    if "floor" in beside:
        notes["floor"] = 'what a model gets that says "lol" to every prompt'
    caption = "\n".join(f"* {task}: {note}" for task, note in notes.items()) or None
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for column in ("task", "metric"):
        table.add_column(column, no_wrap=True)
    for column in ("shots", "items", "ours"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in beside:
        table.add_column(column, justify="right", overflow="fold")
    for i, score in enumerate(shown):
        scale = 1.0 if any(part in score.metric for part in _NOT_SHARES) else 100.0
        error = "" if score.stderr is None else f" ± {scale * score.stderr:.2f}"
        table.add_row(
            f"{score.task} *" if score.note else score.task,
            score.metric if score.how == "none" else f"{score.metric} ({score.how})",
            "" if score.shots is None else str(score.shots),
            "" if score.items is None else f"{score.items:,}",
            f"{scale * score.value:.2f}{error}",
            *("" if values[i] is None else f"{values[i]:.2f}" for values in beside.values()),
        )
    return table


def scores_to_json(scores: Sequence[TaskScore], model: str) -> dict[str, Any]:
    """{"tasks": one object a number, with "published" and its source where known; "versions"}."""
    rows = []
    for score in scores:
        row = dataclasses.asdict(score)
        if floor := FLOORS.get((score.task, score.metric)):
            row["floor"] = floor
        if found := published_score(score, model):
            row["published"] = {"model": model, "score": found[0], "source": found[1]}
        rows.append(row)
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"tasks": rows, "versions": {"python": platform.python_version(), **versions}}
