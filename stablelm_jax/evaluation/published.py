"""What was published of Stable LM 2 and its sisters on the tasks of our groups."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("published.json")


@functools.cache
def _suites() -> list[dict[str, Any]]:
    """Each with its group of tasks, where it was read, and its scores in percent."""
    return json.loads(_FILE.read_text(encoding="utf-8"))


def published_models() -> list[str]:
    """The models with a score."""
    rows = (row for suite in _suites() for row in suite["scores"])
    return list(dict.fromkeys(model for row in rows for model in row["scores"]))


def published_score(
    model: str, task: str, metric: str, shots: int | None, group: str = "", how: str = "none"
) -> tuple[float, str] | None:
    """The score of a published model (percent, or what the metric is in), and where it was read.

    Args:
      task, metric, shots: as lm-eval names them.
      group: that of ours by which the task was asked for: two suites may know the same task.
      how: lm-eval's filter of the answers.
    """
    for suite in sorted(_suites(), key=lambda suite: suite["group"] != group):
        for row in suite["scores"]:
            known = (row["task"], row["metric"], row["shots"], row.get("how", "none"))
            if known == (task, metric, shots, how) and model in row["scores"]:
                return row["scores"][model], suite["source"]
    return None


def published_metric(task: str) -> str | None:
    """The metric that the published suites give first for a task; None for other tasks."""
    rows = (row for suite in _suites() for row in suite["scores"])
    return next((row["metric"] for row in rows if row["task"] == task), None)
