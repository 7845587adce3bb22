"""lm-eval's tasks on a checkpoint (`evaluate --tasks`), and on a run as it trains."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

try:
    import lm_eval  # noqa: F401
except ImportError as error:
    raise ImportError(f"tasks need lm-eval ({error}): pip install -e '.[eval]'") from error

from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.evaluation.lm_eval_model import CheckpointLM
from stablelm_jax.evaluation.other_program import GgufScorer
from stablelm_jax.evaluation.scores import published_scores, scores_to_json, table_of_scores
from stablelm_jax.evaluation.scoring import Scorer
from stablelm_jax.evaluation.suite import Asked, Left, load_tasks, run_tasks
from stablelm_jax.interop.llama_cpp import LlamaCpp
from stablelm_jax.model.compute import Compute
from stablelm_jax.parallel import sharding
from stablelm_jax.preparation.lists import read_list
from stablelm_jax.reporting.evaluations import Told, bar
from stablelm_jax.run.console import make_console
from stablelm_jax.storage.remote import described
from stablelm_jax.tokenizer.chat import ChatTemplate
from stablelm_jax.training.setup import Run


def evaluate_tasks(
    model_of: Callable[[Told], CheckpointLM],
    names: Sequence[str],
    *,
    data: str | Path | None,
    compared: str = "stablelm-2-1_6b",
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: ChatTemplate | None = None,
    contamination: Sequence[Path] = (),
) -> dict[str, Any]:
    """Prints a table to stderr and returns what goes into the JSON.

    Args:
      model_of: makes the model, with what it tells how far it is.
      names, data: those of `load_tasks`; limit, num_fewshot: of `run_tasks`.
      compared: the published model whose scores stand beside.
      chat: the template of all prompts; None: they are plain text.
      contamination: the lists of sources (CONTAMINATED_NAME) of the items that stand in them.

    Returns:
      As `scores_to_json`; "inputs_cut"; and "failed", {task: reason}, where there are any.

    Raises:
      ValueError: an unknown task or published model, data that is missing, a damaged checkpoint.
    """
    rows = [row for row in published_scores() if row["task"] != "mt_bench"]
    models = dict.fromkeys(model for row in rows for model in row["scores"])
    if compared not in models:
        known = ", ".join(models)
        raise ValueError(f"--compare {compared}: no published scores; choose one of {known}")
    console, failed = make_console(stderr=True), {}
    asked = load_tasks(names, data)
    touched = touched_items(contamination, asked) if contamination else None
    with bar(console) as told, contextlib.redirect_stdout(sys.stderr):  # lm-eval prints
        model = model_of(told)
        scores = run_tasks(
            model,
            asked,
            limit=limit,
            num_fewshot=num_fewshot,
            chat=chat is not None,
            touched=touched,
            failed=lambda name, error: failed.update({name: described(error)}),
        )
    console.print(table_of_scores(scores, compared))
    if chat:
        console.print(f"prompts in the chat template {chat.name}; published ones were plain text")
    if model.cut:
        console.print(f"inputs cut at their beginning: {model.cut}; {model.max_length} tokens fit")
    found = scores_to_json(scores, compared) | {"inputs_cut": model.cut}
    return found | {"failed": failed} if failed else found


def touched_items(lists: Sequence[Path], asked: Sequence[Asked]) -> dict[str, set[int]]:
    """{task: its items, by number, that stand in sources}, by the lists of these."""
    tasks = {name: task for one in asked for name, task in one.loaded["tasks"].items()}
    splits = {n: t.config.test_split or t.config.validation_split for n, t in tasks.items()}
    hits = [hit for path in lists for hit in read_list(path)]
    return {
        name: {hit["item"] for hit in hits if (hit["task"], hit["split"]) == (name, split)}
        for name, split in splits.items()
    }


def lm_of_checkpoint(
    saved: SavedModel,
    mesh: Mesh,
    *,
    batch_tokens: int,
    dtype: Any = None,
    max_length: int | None = None,
    told: Told = lambda what, done, count: None,
    **options: Any,
) -> CheckpointLM:
    """A checkpoint as lm-eval's model; reads the weights onto the mesh.

    Args:
      batch_tokens: that of `Scorer`; told, options: those of `CheckpointLM`.
      dtype: type of matrix products; by default bfloat16, float32 on a CPU.
      max_length: tokens of the longest input; by default the model's context.

    Raises:
      CheckpointError: it is damaged.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    dtype = jnp.dtype(dtype or ("float32" if on_cpu else "bfloat16"))
    scorer = Scorer(
        saved.model,
        mesh,
        max_length=max_length or saved.max_positions,
        compute=Compute(dtype=dtype, num_valid_ids=saved.num_valid_ids),
        batch_tokens=batch_tokens,
    )
    model = CheckpointLM(scorer, saved.tokenizer, told=told, end_ids=saved.end_ids, **options)
    model.load(saved.load(mesh))
    return model


def lm_of_gguf(
    path: str, saved: SavedModel, *, told: Told, max_length: int | None = None
) -> CheckpointLM:
    """A GGUF file as lm-eval's model, which scores and generates nothing.

    `saved`: the checkpoint that it was written from, whose tokenizer and context it has.
    """
    length = max_length or saved.max_positions
    llama = LlamaCpp(path, length)
    llama.check_tokens(saved.tokenizer)
    scorer = GgufScorer(llama, length, saved.num_valid_ids)
    return CheckpointLM(scorer, saved.tokenizer, told=told, end_ids=saved.end_ids)


class TrainingTasks:
    """The tasks of a run's config; their programs are kept from one time to the next."""

    def __init__(self, run: Run, left: Callable[[], bool]):
        """Loads the tasks and their data, with the errors of `load_tasks`.

        `left`: asked after each batch, on every process alike; whether to leave the evaluation.
        """

        def leave_if_asked(*_: Any) -> None:
            if left():
                raise Left

        config = run.config
        self._limit = config.evaluation.tasks_limit or None
        self._asked = load_tasks(config.evaluation.tasks, config.evaluation.task_data or None)
        parts = sharding.batch_parts(run.mesh) * config.training.accumulation
        length = config.data.sequence_length
        scorer = Scorer(
            run.model,
            run.mesh,
            max_length=length,
            compute=run.compute,
            # A training step has room for so many, and a forward pass needs less.
            batch_tokens=max(1, config.data.batch_size // parts) * length,
        )
        self._model = CheckpointLM(scorer, run.tokenizer, told=leave_if_asked)

    def evaluate(
        self, params: Any, step: int, console: Console, failed: Callable[[str, Exception], None]
    ) -> dict[str, float] | None:
        """Prints a table; returns {TASK/METRIC: score}, None where the evaluation was left.

        `failed`: told of each task that has no scores, and of what ended all of them.
        """
        try:
            self._model.load(params)
            scores = run_tasks(
                self._model,
                self._asked,
                limit=self._limit,
                bootstraps=0,
                failed=lambda name, error: failed(f"task {name}", error),
            )
        except Left:
            return None
        except Exception as error:  # of any library, or too little memory: the run can do without
            failed("tasks", error)
            return {}
        finally:
            self._model.unload()
        console.print(table_of_scores(scores, "stablelm-2-1_6b", f"tasks after step {step:,}"))
        return {score.key: score.value for score in scores if not score.is_detail}
