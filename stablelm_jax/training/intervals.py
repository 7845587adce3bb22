"""What a run does at intervals besides saving: held-out text, tasks, samples, norms by layer.

No evaluation ends the run: what fails becomes an event.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping

import jax

from stablelm_jax.checkpoint.names import checkpoint_name
from stablelm_jax.model.loss import Batch
from stablelm_jax.parallel import distributed
from stablelm_jax.run.services import Services
from stablelm_jax.storage.remote import described
from stablelm_jax.training.begin import Progress
from stablelm_jax.training.held_out import HeldOutError, evaluate_held_out
from stablelm_jax.training.programs import Programs
from stablelm_jax.training.setup import Run
from stablelm_jax.training.state import TrainState

# While tasks run, this long without an answer is no hang: their data may come over the network.
PATIENCE = 1800.0
TASKS = "eval/tasks/"  # their metrics begin so


class Intervals:
    """Does what is due after a step, on every process alike."""

    def __init__(self, run: Run, services: Services, step: int):
        """`step`: where the run begins; what the metrics hold of later steps is cut off."""
        self._run, self._services, self._tasks = run, services, None
        kept = services.log.cut_back(step)
        # An evaluation that is in the metrics already is not repeated.
        self._done = {
            "held_out": {line["step"] for line in kept if "eval/loss" in line},
            "tasks": {line["step"] for line in kept if any(key.startswith(TASKS) for key in line)},
        }

    def prepare(self, programs: Programs) -> None:
        """Takes the compiled programs, and loads the tasks: missing data is told at once."""
        self._programs = programs
        if not self._run.config.evaluation.tasks_every:
            return
        try:
            with distributed.together_or_not(Exception):
                from stablelm_jax.evaluation.checkpoint_tasks import TrainingTasks

                tasks = TrainingTasks(self._run, self.left)
            self._tasks = tasks
        except Exception as error:  # of any library: the run can do without
            self._failed(0, f"tasks will not be evaluated: {error}")

    def due(self, every: int, step: int) -> bool:
        """Whether something that is done every so many steps, and after the last, is due."""
        return every > 0 and (step % every == 0 or step == self._run.config.training.num_steps)

    def evaluate(self, state: TrainState, progress: Progress) -> bool:
        """Held-out text and tasks; False where a signal was heard meanwhile and they were left."""
        settings, services, step = self._run.config.evaluation, self._services, progress.step
        for kind, every, patience, evaluated in (
            ("held_out", settings.every, 0.0, self._held_out),
            ("tasks", settings.tasks_every, PATIENCE, self._task_scores),
        ):
            if not self.due(every, step) or distributed.gathered(step in self._done[kind])[0]:
                continue
            if not self._done[kind]:  # later ones come as no surprise
                services.events.print(f"step {step}: evaluating ({kind.replace('_', '-')})")
            jax.block_until_ready(state)  # evaluating would wait too: this is the steps' time
            with services.stop.phase("evaluating"), services.watchdog.patient(patience):
                found = evaluated(state, step)
                if found:
                    services.log.write({"step": step, "time": time.time(), **found})
                    self.draw()
            self._done[kind].add(step)
            if found is None:
                return False
        if self.due(self._run.config.report.every or 0, step):
            with services.goodput.cause("evaluation"):
                services.log.write_page()
        return True

    def _held_out(self, state: TrainState, step: int) -> Mapping[str, float | None] | None:
        """Metrics: {} where it failed, None where a signal was heard meanwhile."""
        run, began = self._run, time.monotonic()
        eval_step = self._programs.eval_step
        try:
            line = evaluate_held_out(
                eval_step,
                run.joined(state),
                run.held_out(),
                run.mesh,
                run.objective,
                self.left,
                functools.partial(self._services.log.write_held_out, checkpoint_name(step)),
            )
        except (HeldOutError, jax.errors.JaxRuntimeError) as error:  # the latter: too little memory
            self._failed(step, f"step {step}: {error}; the run goes on", began)
            return {}
        if line is not None:
            from stablelm_jax.reporting.console import show_evaluation

            show_evaluation(self._services.console, run, step, line)
        return line

    def _task_scores(self, state: TrainState, step: int) -> Mapping[str, float] | None:
        """Metrics of the tasks that end well; None where a signal was heard meanwhile."""
        if self._tasks is None:
            return {}
        began = time.monotonic()

        def failed(what: str, error: Exception) -> None:
            text = f"step {step}: {what} failed ({described(error)}); the run goes on"
            self._failed(step, text, began)

        params = self._programs.weights(state)
        found = self._tasks.evaluate(params, step, self._services.console, failed)
        return found and {f"{TASKS}{key}": value for key, value in found.items()}

    def layer_norms(self, state: TrainState, batch: Batch, step: int) -> None:
        """A metrics line with the norms by layer in the update that leads to `step`."""
        if not self.due(self._run.config.training.layer_norms_every, step):
            return
        jax.block_until_ready(state)
        with self._services.goodput.cause("evaluation"):
            found = jax.device_get(self._programs.layer_norms(state, batch))
        line = {key: value.item() for key, value in found.items()}
        self._services.log.write({"step": step, "time": time.time(), **line})

    def left(self) -> bool:
        """Between two batches outside the loop: whether to leave them for a signal."""
        self._services.watchdog.moved()
        return distributed.anywhere(self._services.stop.name is not None)

    def _failed(self, step: int, text: str, began: float | None = None) -> None:
        seconds = None if began is None else time.monotonic() - began
        self._services.events.tell(
            "evaluation_failed", text, style="bold red", step=step, after_seconds=seconds
        )

    def draw(self, at_end: bool = False) -> None:
        """The picture of the losses so far, and the page unless that has an interval of its own.

        `at_end`: of the run, when the page shows the last samples and the last save.
        """
        is_text = self._run.objective.name == "pretrain"  # of answers it says nothing
        manifests = self._run.manifests.items()
        self._services.log.draw({n: m.unigram_entropy if is_text else None for n, m in manifests})
        every = self._run.config.report.every
        if every is None or (every and at_end):
            self._services.log.write_page()

    def sample(self, state: TrainState, progress: Progress) -> None:
        """Continues the prompts of the config."""
        step, services = progress.step, self._services
        if not self.due(self._run.config.samples.every, step) or step == 0:
            return
        jax.block_until_ready(state)
        with services.stop.phase("sampling"):
            texts = self._programs.samples(self._programs.weights(state))
        services.watchdog.moved()
        from stablelm_jax.reporting.console import reading_note, show_sample

        note = reading_note(self._run, progress.rows_consumed)
        show_sample(services.console, step, texts, note)
        whole = "\n\n".join(f"[{prompt}]{text}" for prompt, text in texts.items())
        services.log.write_sample(checkpoint_name(step), f"{note}\n\n{whole}\n")
