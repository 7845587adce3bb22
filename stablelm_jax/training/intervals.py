"""What a run does at intervals besides saving: evaluations and samples."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from stablelm_jax.checkpoint.names import checkpoint_name
from stablelm_jax.parallel import distributed
from stablelm_jax.run.services import Services
from stablelm_jax.training.begin import Progress
from stablelm_jax.training.evaluations import PATIENCE, TASKS, Evaluations
from stablelm_jax.training.programs import Programs
from stablelm_jax.training.setup import Run


class Intervals:
    """Does what is due after a step, on every process alike."""

    def __init__(self, run: Run, services: Services, step: int):
        """`step`: where the run begins; what the metrics hold of later steps is cut off."""
        self._run, self._services = run, services
        self._evaluations = Evaluations(run, services.events, services.console, self._left)
        kept = services.log.cut_back(step)
        # An evaluation that is in the metrics already is not repeated.
        self._done = {
            "held_out": {line["step"] for line in kept if "eval/loss" in line},
            "tasks": {line["step"] for line in kept if any(key.startswith(TASKS) for key in line)},
        }

    def prepare(self, programs: Programs) -> None:
        """Takes the compiled programs, and loads the tasks of the config."""
        self._programs = programs
        self._evaluations.prepare()

    def due(self, every: int, step: int) -> bool:
        """Whether something that is done every so many steps, and after the last, is due."""
        return every > 0 and (step % every == 0 or step == self._run.config.training.num_steps)

    def evaluate(self, params: Any, progress: Progress) -> bool:
        """Held-out text and tasks; False where a signal was heard meanwhile and they were left."""
        settings, step = self._run.config.evaluation, progress.step
        eval_step = self._programs.eval_step
        return self._evaluate(
            "held_out",
            settings.every,
            step,
            lambda: self._evaluations.held_out(eval_step, params, step),
        ) and self._evaluate(
            "tasks", settings.tasks_every, step, lambda: self._evaluations.tasks(params, step)
        )

    def _evaluate(self, what: str, every: int, step: int, evaluate: Callable[[], Any]) -> bool:
        if not self.due(every, step) or distributed.agreed(step in self._done[what]):
            return True
        services = self._services
        bound = PATIENCE if what == "tasks" else 0.0
        with services.stop.phase("evaluating"), services.watchdog.patient(bound):
            found = evaluate()
        if found:
            services.log.write({"step": step, "time": time.time(), **found})
            self.draw()
        self._done[what].add(step)
        return found is not None

    def _left(self) -> bool:
        """Between two batches of an evaluation: whether to leave it for a signal."""
        self._services.watchdog.moved()
        return distributed.anywhere(self._services.stop.name is not None)

    def draw(self) -> None:
        """Draws the losses so far."""
        self._services.log.draw({n: m.unigram_entropy for n, m in self._run.manifests.items()})

    def sample(self, params: Any, progress: Progress) -> None:
        """Continues the prompts of the config."""
        step, services = progress.step, self._services
        if not self.due(self._run.config.samples.every, step) or step == 0:
            return
        with services.stop.phase("sampling"):
            texts = self._programs.samples(params)
        services.watchdog.moved()
        from stablelm_jax.reporting.console import reading_note, show_sample

        note = reading_note(self._run, progress.rows_consumed)
        show_sample(services.console, step, texts, note)
        whole = "\n\n".join(f"[{prompt}]{text}" for prompt, text in texts.items())
        services.log.write_sample(checkpoint_name(step), f"{note}\n\n{whole}\n")
