"""Tasks by name, loaded and run: lm-eval's own, and the groups in `tasks/` that put them together.

lm-eval takes half a minute to read all of its fourteen thousand tasks. The folders that ours come
from are read first, the rest only where a name is not among them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import logging
import os
import random
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import nltk
import numpy as np
from datasets.exceptions import DatasetsError
from lm_eval import tasks as stock
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from stablelm_jax.evaluation.scores import TaskScore
from stablelm_jax.preparation.contamination import task_index
from stablelm_jax.storage.remote import described

GROUPS = Path(__file__).parent / "tasks"
SEED = 1234  # of the examples that are drawn for few-shot prompts, as in lm-eval
BOOTSTRAPS = 1000  # samples where a standard error has no formula, as that of a perplexity
_FOLDERS = (
    *("arc", "gsm8k", "hellaswag", "ifeval", "lambada", "lambada_multilingual"),
    *("lambada_multilingual_stablelm", "mmlu/default", "okapi", "piqa", "sciq", "truthfulqa"),
    "winogrande",
)


@dataclasses.dataclass(frozen=True)
class Asked:
    """What one name stands for: a task, or a group of them.

    Attributes:
      loaded: tasks and groups, as lm-eval's `TaskManager.load` returns them.
      notes: {task: in what its data differs from lm-eval's own}.
    """

    name: str
    loaded: Mapping[str, Any]
    notes: Mapping[str, str]


class Left(Exception):
    """The evaluation was left before its end, as somebody asked."""


def load_tasks(names: Sequence[str], data: str | Path | None = None) -> list[Asked]:
    """The tasks of these names, with their data.

    Args:
      names: of tasks, of groups of them, or paths of task files of your own.
      data: a folder made by launch/corpora/task_data.py; what it lacks comes from the Hub.

    Raises:
      ValueError: an unknown name, with the nearest known; a folder that is none; no data.
    """
    index = task_index(Path(data)) if data else {}
    if data and (splitter := Path(data) / "nltk_data").is_dir():
        nltk.data.path.insert(0, str(splitter))  # IFEval downloads it where it is not found
    notes = {name: entry["note"] for name, entry in index.items() if entry["note"]}
    asked = []
    with tempfile.TemporaryDirectory() as folder, _undisturbed():
        manager = _manager(names)
        for name in index.keys() & manager.task_index.keys():
            _redirect(manager, name, index[name], Path(folder))
        for name in names:
            try:
                asked.append(Asked(name, manager.load([name]), notes))
            except ImportError as error:
                what = f"task {name!r} needs a package that is not here: {described(error)}"
                raise ValueError(f"{what}; pip install -e '.[eval]'") from error
            except (OSError, ValueError, DatasetsError) as error:
                raise ValueError(
                    f"task {name!r} cannot be loaded: {described(error)}. Its data comes from the "
                    "Hugging Face Hub; where that is out of reach, --task-data DIR holds the data "
                    "of those tasks that PyPI has (docs/evaluation.md)"
                ) from error
    return asked


def _manager(names: Sequence[str]) -> TaskManager:
    """Knows all of these names; a path is that of a task file."""
    root = Path(stock.__file__).parent
    ours = [root / folder for folder in _FOLDERS] + [GROUPS]
    manager = TaskManager(include_path=ours, include_defaults=False)
    wanted = [name for name in names if not name.endswith(".yaml")]
    if not set(wanted) <= set(manager.all_tasks):
        manager = TaskManager(include_path=[GROUPS])  # everything
    for name in wanted:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            question = f"did you mean {near[0]!r}? " if near else ""
            groups = ", ".join(sorted(path.stem for path in GROUPS.glob("*.yaml")))
            raise ValueError(
                f"there is no task {name!r}; {question}Our groups are {groups}; `lm-eval ls tasks` "
                "lists the others, and a path that ends in .yaml is a task file"
            )
    return manager


def _redirect(manager: TaskManager, name: str, entry: dict[str, Any], folder: Path) -> None:
    """From now on the task of this name is lm-eval's with the data of `entry`."""
    changed = manager.task_index[name]
    task = {
        "include": str(changed.yaml_path),
        "task": name,
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": entry["files"]},
        **entry["changes"],
    }
    changed.yaml_path = folder / f"{name}.yaml"
    changed.yaml_path.write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML


def run_tasks(
    model: LM,
    asked: Sequence[Asked],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    bootstraps: int = BOOTSTRAPS,
    chat: bool = False,
    touched: Mapping[str, Collection[int]] | None = None,
    failed: Callable[[str, Exception], None],
) -> list[TaskScore]:
    """Every number of every task.

    Args:
      limit: items of each task, its first ones; None: all.
      num_fewshot: examples in each prompt instead of a task's own number; tasks that are fixed to
        none stay so.
      chat: prompts are conversations in the model's template, each example a turn of its own.
      touched: {task: its items, by number, that stand in the training text}.
      bootstraps: samples for standard errors without a formula, which lm-eval says on stdout; 0:
        no standard errors at all.
      failed: told of a task that ends with an error, whose scores are then missing.

    Raises:
      Left: from what the model tells.
    """
    scores = []
    for one in asked:
        try:
            for task in one.loaded["tasks"].values():
                own = task.get_config("num_fewshot")
                if own is None or (num_fewshot is not None and own != 0):
                    task.set_config(key="num_fewshot", value=num_fewshot or 0)
                task.set_fewshot_seed(seed=SEED)
            with _undisturbed():
                found = evaluate(
                    lm=model,
                    task_dict=one.loaded,
                    limit=limit,
                    bootstrap_iters=bootstraps,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=chat,
                    log_samples=bool(touched),
                )
            scores += _scores(one, found, touched or {})
        except Left:
            raise
        except Exception as error:  # of a task's own code, a data set, the device
            failed(one.name, error)
    return scores


def _scores(
    asked: Asked, found: Mapping[str, Any], touched: Mapping[str, Collection[int]]
) -> Iterator[TaskScore]:
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, how = key.partition(",")
            if not how or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{how}")
            yield TaskScore(
                asked=asked.name,
                task=task,
                metric=metric,
                how=how,
                shots=found["n-shot"].get(task),
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                items=found["n-samples"].get(task, {}).get("effective"),
                version=str(found["versions"].get(task, "")),
                note=asked.notes.get(task, ""),
                **_untouched(found, task, metric, how, touched.get(task, ())),
            )


def _untouched(
    found: Mapping[str, Any], task: str, metric: str, how: str, touched: Collection[int]
) -> dict[str, Any]:
    """The score of the items that are not `touched`; nothing where it is no mean over items."""
    samples = [s for s in found.get("samples", {}).get(task, ()) if s["filter"] == how]
    values = {s["doc_id"]: s[metric] for s in samples if isinstance(s.get(metric), int | float)}
    kept = [value for number, value in values.items() if number not in touched]
    is_mean = values and np.isclose(
        np.mean(list(values.values())), found["results"][task][f"{metric},{how}"]
    )
    if not (touched and kept and is_mean):
        return {}
    return {"untouched": float(np.mean(kept)), "untouched_items": len(kept)}


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Python's and numpy's random numbers as lm-eval starts them; as they were afterwards.

    Inside and after it lm-eval and its data are quiet.
    """
    # For its standard errors lm-eval would fork, which a process with jax's threads must not.
    os.environ["DISABLE_MULTIPROC"] = "1"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every task that is ours
    # It would tell of each answer that is in no language.
    logging.getLogger("lm_eval.tasks.ifeval").setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()  # one for every file
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
