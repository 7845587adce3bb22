"""Task scores for a person, beside the published ones, and as JSON."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from stablelm_jax.evaluation.published import published_metric, published_score
from stablelm_jax.evaluation.task_scores import TaskScore

_LIBRARIES = ("stablelm_jax", "lm_eval", "jax", "datasets")
_NOT_SHARES = ("perplexity", "byte", "bits")  # metrics that are no share of the items


def table_of_scores(scores: Sequence[TaskScore], model: str, title: str = "tasks") -> Table:
    """Task, metric, examples, ours with its standard error, and the published score of `model`.

    Shares are in percent. Of a task with a published metric that one is shown, else all.
    """
    table = Table(title=title, title_justify="left")
    for column in ("task", "metric"):
        table.add_column(column, no_wrap=True)
    for column in ("shots", "items", "ours"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column(model, justify="right", overflow="fold")
    for score in filter(_shown, scores):
        found = _published(score, model)
        table.add_row(
            f"{score.task} *" if score.note else score.task,
            score.metric if score.how == "none" else f"{score.metric} ({score.how})",
            "" if score.shots is None else str(score.shots),
            "" if score.items is None else f"{score.items:,}",
            _ours(score),
            "" if found is None else f"{found[0]:.2f}",
        )
    notes = {score.task: score.note for score in scores if score.note}
    table.caption = "\n".join(f"* {task}: {note}" for task, note in notes.items()) or None
    table.caption_justify = "left"
    return table


def _published(score: TaskScore, model: str) -> tuple[float, str] | None:
    what = score.task, score.metric, score.shots
    return published_score(model, *what, group=score.asked, how=score.how)


def _shown(score: TaskScore) -> bool:
    return not score.is_detail and published_metric(score.task) in (None, score.metric)


def _ours(score: TaskScore) -> str:
    scale = 1.0 if any(part in score.metric for part in _NOT_SHARES) else 100.0
    error = "" if score.stderr is None else f" ± {scale * score.stderr:.2f}"
    return f"{scale * score.value:.2f}{error}"


def scores_to_json(scores: Iterable[TaskScore], model: str) -> dict[str, Any]:
    """{"tasks": one object a number, with "published" and its source where known; "versions"}."""
    rows = []
    for score in scores:
        found = _published(score, model)
        row = dataclasses.asdict(score)
        if found is not None:
            row |= {"published": {"model": model, "score": found[0], "source": found[1]}}
        rows.append(row)
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"tasks": rows, "versions": {"python": platform.python_version(), **versions}}
