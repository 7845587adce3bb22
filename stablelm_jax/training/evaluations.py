"""What a run is judged by at its intervals: held-out text and tasks. None of it ends the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from rich.console import Console

from stablelm_jax.evaluation.progress import Asking, Left
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

    Both methods return the metrics, {} where it failed, None where a signal was heard meanwhile.
    """

    def __init__(self, run: Run, events: Events, console: Console, left: Callable[[], bool]):
        """`left`: asked after each batch, on every process alike; whether to leave it."""
        self._run, self._events, self._console, self._left = run, events, console, left
        self._tasks: Tasks | None = None

    def prepare(self) -> None:
        """Loads the tasks of the config, if it has any, so that missing data is told at once."""
        if not self._run.config.evaluation.tasks_every:
            return
        tasks, error = None, None
        try:
            tasks = Tasks(self._run)
        except Exception as caught:  # of any library: the run can do without
            error = caught
        if distributed.anywhere(error is not None):
            text = str(error) if error else "another host cannot load them; see its output"
            self._failed(0, f"tasks will not be evaluated: {text}")
        else:
            self._tasks = tasks

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
        """The scores of the tasks, as eval/tasks/TASK/METRIC."""
        if self._tasks is None:
            return {}
        began = time.monotonic()

        def failed(name: str, error: Exception) -> None:
            text = f"step {step}: task {name} failed ({described(error)}); the run goes on"
            self._failed(step, text, began)

        try:
            return self._tasks.run(params, step, self._left, self._console, failed)
        except Left:
            return None
        except Exception as error:  # of any library, or too little memory: the run can do without
            text = f"step {step}: tasks failed ({type(error).__name__}: {error}); the run goes on"
            self._failed(step, text, began)
            return {}

    def _failed(self, step: int, text: str, began: float | None = None) -> None:
        seconds = None if began is None else time.monotonic() - began
        self._events.tell(
            "evaluation_failed", text, style="bold red", step=step, after_seconds=seconds
        )


class Tasks:
    """lm-eval's tasks of a run's config; the programs are kept from one time to the next."""

    def __init__(self, run: Run):
        """Raises ValueError where a task or its data is not there."""
        try:
            import lm_eval  # noqa: F401
        except ImportError as error:
            raise ValueError("lm-eval is missing: pip install 'stablelm_jax[eval]'") from error
        from stablelm_jax.evaluation.generate_late import GenerateLate
        from stablelm_jax.evaluation.scoring import Scorer
        from stablelm_jax.evaluation.suite import load_tasks

        config, settings = run.config, run.config.evaluation
        parts = sharding.batch_parts(run.mesh) * config.training.accumulation
        length = config.data.sequence_length
        batch_tokens = max(1, config.data.batch_size // parts) * length  # what a step has room for
        self._text, self._limit = run.tokenizer, settings.tasks_limit or None
        self._asked = load_tasks(list(settings.tasks), settings.task_data or None)
        self._scorer = Scorer(
            run.model,
            run.mesh,
            max_length=length,
            dtype=run.compute.dtype,
            attention=config.training.attention,
            num_valid_ids=config.training.num_valid_ids,
            batch_tokens=batch_tokens,
        )
        self._generate = GenerateLate(run.model, self._scorer, batch_tokens)

    def run(
        self,
        params: Any,
        step: int,
        left: Callable[[], bool],
        console: Console,
        failed: Callable[[str, Exception], None],
    ) -> dict[str, float]:
        """Every score of every task that ends well; raises `Left` where it was left."""
        from stablelm_jax.evaluation.lm_eval_model import CheckpointLM
        from stablelm_jax.evaluation.task_scores import run_tasks
        from stablelm_jax.evaluation.task_table import table_of_scores

        weights = self._scorer.compute_copy(params)
        self._generate.load(weights)
        try:
            progress = Asking(left)
            model = CheckpointLM(self._scorer, weights, self._text, self._generate, progress)
            scores = run_tasks(model, self._asked, limit=self._limit, bootstraps=0, failed=failed)
        finally:
            self._generate.unload()
        console.print(table_of_scores(scores, _COMPARED, f"tasks after step {step:,}"))
        return {f"{TASKS}{score.key}": score.value for score in scores if not score.is_detail}
