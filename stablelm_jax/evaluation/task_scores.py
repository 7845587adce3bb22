"""Runs lm-eval's tasks on a model, and what comes of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from stablelm_jax.evaluation.progress import Left
from stablelm_jax.evaluation.suite import Asked, quiet

SEED = 1234  # of the examples that are drawn for few-shot prompts, as in lm-eval
BOOTSTRAPS = 1000  # where a standard error has no formula, as of a perplexity


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """One number.

    Attributes:
      asked: the name that it was asked for by, which may be a group's.
      how: lm-eval's filter of the answers; 'none' where there is one way to read them.
      shots: examples in the prompt; None for a group of tasks that differ in it.
      stderr: standard error; None where there is none.
      items: how many there were; None for a group.
      version: of the task in lm-eval.
      note: in what the data differs from lm-eval's own.
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

    @property
    def key(self) -> str:
        """TASK/METRIC, and /HOW where answers are read in several ways."""
        return f"{self.task}/{self.metric}" + ("" if self.how == "none" else f"/{self.how}")

    @property
    def is_detail(self) -> bool:
        """One subject of MMLU, whose mean is a score of its own."""
        return self.asked != self.task and self.task.startswith("mmlu_")


def run_tasks(
    model: LM,
    asked: Sequence[Asked],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    bootstraps: int = BOOTSTRAPS,
    failed: Callable[[str, Exception], None] | None = None,
) -> list[TaskScore]:
    """Every number of every task.

    Args:
      limit: items of each task, its first ones; None: all.
      num_fewshot: examples in each prompt instead of a task's own number; tasks that are fixed to
        none stay so.
      bootstraps: samples for standard errors without a formula, which lm-eval says on stdout; 0:
        no standard errors at all.
      failed: told of a task that ends with an error, whose scores are then missing; by default the
        error ends all of it.

    Raises:
      Left: as the model's progress says.
    """
    scores = []
    for one in asked:
        try:
            found = _run(model, one, limit, num_fewshot, bootstraps)
        except Left:
            raise
        except Exception as error:  # of a task's own code, a data set, the device
            if failed is None:
                raise
            failed(one.name, error)
        else:
            scores += _scores(one, found)
    return scores


def _run(model: LM, asked: Asked, limit, num_fewshot, bootstraps) -> Mapping[str, Any]:
    loaded = TaskManager(include_defaults=False).load(list(asked.parts))
    for task in loaded["tasks"].values():
        _set_examples(task, num_fewshot)
    with quiet(), _seeded(), _one_process():
        return evaluate(
            lm=model,
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=bootstraps,
            log_samples=False,
        )


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Python's and numpy's own random numbers as lm-eval starts them; as they were afterwards."""
    before = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(SEED)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """lm-eval would fork for its standard errors, which a process with jax's threads must not."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _set_examples(task: Any, num_fewshot: int | None) -> None:
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SEED)


def _scores(asked: Asked, found: Mapping[str, Any]) -> Iterator[TaskScore]:
    for task, values in found["results"].items():
        items = found["n-samples"].get(task, {}).get("effective")
        for key, value in values.items():
            metric, _, how = key.partition(",")
            if not how or metric.endswith("_stderr"):
                continue
            yield TaskScore(
                asked=asked.name,
                task=task,
                metric=metric,
                how=how,
                shots=found["n-shot"].get(task),
                value=float(value),
                stderr=_number(values.get(f"{metric}_stderr,{how}")),
                items=items,
                version=str(found["versions"].get(task, "")),
                note=asked.notes.get(task, ""),
            )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
