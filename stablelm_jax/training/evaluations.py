"""What a run is judged by at its intervals: held-out text and tasks. None of it ends the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from rich.console import Console

from stablelm_jax.parallel import distributed, sharding
from stablelm_jax.run.events import Events
from stablelm_jax.storage.remote import described
from stablelm_jax.training.held_out import EvalStep, HeldOutError, evaluate_held_out
from stablelm_jax.training.setup import Run

# While tasks run, this long without an answer is no hang: their data may come over the network.
PATIENCE = 1800.0
TASKS = "eval/tasks/"  # their metrics begin so
_COMPARED = "stablelm-2-1_6b"


class Evaluations:
    """Evaluates the parameters it is given; what fails becomes an event.

    `held_out` and `tasks` return metrics: {} where it failed, None where a signal was heard
    meanwhile. Tasks keep their programs from one time to the next.
    """

    def __init__(self, run: Run, events: Events, console: Console, left: Callable[[], bool]):
        """`left`: asked after each batch, on every process alike; whether to leave it."""
        self._run, self._events, self._console, self._left = run, events, console, left
        self._asked, self._model = [], None  # tasks, and the model as lm-eval sees it

    def prepare(self) -> None:
        """Loads the tasks of the config, if it has any, so that missing data is told at once."""
        if not self._run.config.evaluation.tasks_every:
            return
        error = None
        try:
            self._load_tasks()
        except Exception as caught:  # of any library: the run can do without
            error = caught
        if distributed.anywhere(error is not None):
            self._model = None
            text = str(error) if error else "another host cannot load them; see its output"
            self._failed(0, f"tasks will not be evaluated: {text}")

    def _load_tasks(self) -> None:
        """Raises ValueError where lm-eval, a task or its data is not there."""
        try:
            import lm_eval  # noqa: F401
        except ImportError as error:
            raise ValueError("lm-eval is missing: pip install -e '.[eval]'") from error
        from stablelm_jax.evaluation.lm_eval_model import CheckpointLM
        from stablelm_jax.evaluation.scoring import Scorer
        from stablelm_jax.evaluation.suite import Left, load_tasks

        def leave_if_asked(*_: Any) -> None:
            if self._left():
                raise Left

        run, config = self._run, self._run.config
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
        self._asked = load_tasks(config.evaluation.tasks, config.evaluation.task_data or None)
        self._model = CheckpointLM(scorer, run.tokenizer, told=leave_if_asked)

    def held_out(
        self, eval_step: EvalStep, params: Any, step: int
    ) -> Mapping[str, float | None] | None:
        """Loss, perplexity and bits a byte of held-out text."""
        run = self._run
        began = time.monotonic()
        try:
            means = evaluate_held_out(eval_step, params, run.held_out(), run.mesh, self._left)
        except (HeldOutError, jax.errors.JaxRuntimeError) as error:  # the latter: too little memory
            self._failed(step, f"step {step}: {error}; the run goes on", began)
            return {}
        if means is not None:
            from stablelm_jax.reporting.console import show_evaluation

            show_evaluation(self._console, run, step, means)
        return means

    def tasks(self, params: Any, step: int) -> Mapping[str, float] | None:
        """The scores of the tasks that end well, as eval/tasks/TASK/METRIC."""
        if self._model is None:
            return {}
        from stablelm_jax.evaluation.scores import table_of_scores
        from stablelm_jax.evaluation.suite import Left, run_tasks

        began = time.monotonic()

        def failed(what: str, error: Exception) -> None:
            text = f"step {step}: {what} failed ({described(error)}); the run goes on"
            self._failed(step, text, began)

        limit = self._run.config.evaluation.tasks_limit or None
        try:
            self._model.load(params)
            scores = run_tasks(
                self._model,
                self._asked,
                limit=limit,
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
        self._console.print(table_of_scores(scores, _COMPARED, f"tasks after step {step:,}"))
        return {f"{TASKS}{score.key}": score.value for score in scores if not score.is_detail}

    def _failed(self, step: int, text: str, began: float | None = None) -> None:
        seconds = None if began is None else time.monotonic() - began
        self._events.tell(
            "evaluation_failed", text, style="bold red", step=step, after_seconds=seconds
        )
