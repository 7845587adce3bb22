"""The training loop. Its order is fixed, since exact resume rests on it:

    evaluate and sample -> save -> next(batch) -> step

so a checkpoint `global_step<N>` is the state after N updates, before batch N is drawn.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from rich.console import Console

from stablelm_jax import config as config_lib
from stablelm_jax.checkpoint.names import checkpoint_name
from stablelm_jax.checkpoint.saving import SaveFailed, Saver
from stablelm_jax.checkpoint.store import Checkpoint, CheckpointStore
from stablelm_jax.parallel import distributed, sharding
from stablelm_jax.reporting.picture import draw_losses
from stablelm_jax.run import console as show
from stablelm_jax.run.compilation_cache import CompilationCache
from stablelm_jax.run.events import Events
from stablelm_jax.run.folder import RunFolder, git_commit
from stablelm_jax.run.metrics import LossSums
from stablelm_jax.run.profile import Profiler
from stablelm_jax.run.shard_watch import ShardWatch
from stablelm_jax.run.signals import EXIT_STOPPED, StopRequest
from stablelm_jax.run.watchdog import Watchdog, write_stacks
from stablelm_jax.run.writers import Writers
from stablelm_jax.training.evaluations import PATIENCE, TASKS, Evaluations
from stablelm_jax.training.faults import Faults, Stopped, rewound
from stablelm_jax.training.meter import Meter
from stablelm_jax.training.programs import compile_programs
from stablelm_jax.training.resume import guard_to_json, to_checkpoint
from stablelm_jax.training.setup import Run
from stablelm_jax.training.start import ResumeOptions, Start

HANG_PAUSE = 5.0  # seconds in which the other processes write their stacks


class Trainer:
    """One start of a run, from its newest checkpoint to its last step or a signal."""

    def __init__(
        self,
        run: Run,
        folder: RunFolder,
        console: Console,
        cache: CompilationCache,
        wishes: ResumeOptions,
        stop: StopRequest,
    ):
        self.folder, self.console, self.cache, self.stop = folder, console, cache, stop
        self.config = run.config
        self.last_step = run.config.training.num_steps
        self.events = Events(console, folder.events if distributed.is_first() else None)
        self.store = self._open_store()
        self._say_what_is_safe()
        with stop.phase("restoring", leave=True):
            start = Start(run, self.store, wishes, self.events)
            self.shards = ShardWatch(
                folder.path / "shards.json",
                start.run.sources,
                self.events.print,
                enabled=self.config.data.check_shards,
            )
            self.shards.start()
        self.run, self.state, self.position = start.run, start.state, start.position
        self.saver = Saver(self.config.checkpoint, self.store, self.events)
        self.losses = LossSums(list(self.run.sources), self.position.loss_sums)
        self.evaluated = {"held_out": set(), "tasks": set()}
        if distributed.is_first():
            self.evaluated = self._cut_back()
        self.evaluations = Evaluations(self.run, self.events, console, self._left)
        self.writers = Writers(self.config, folder)
        self.agreement = distributed.Agreement()
        self.watchdog = Watchdog(self.config.training.hang_seconds, self._hung)
        self.faults = Faults(self.run, self.events)
        self.meter = Meter(self.run)
        self._told: set[str] = set()
        if not start.resumed and self.config.checkpoint.save_initial:
            self._save_first()

    def _open_store(self) -> CheckpointStore:
        settings = self.config.checkpoint
        return CheckpointStore(
            self.folder.checkpoints,
            keep_latest=settings.keep_latest,
            keep_every=settings.keep_every,
            asynchronous=settings.asynchronous,
            timeout_seconds=settings.timeout_seconds,
            first_process=distributed.is_first(),
        )

    def train(self) -> int:
        """Runs to the last step; returns the exit code."""
        try:
            with self.stop.phase("compiling", leave=True):
                self.programs = compile_programs(self.run, self.console, self.cache)
                self.faults.compile()
                self.evaluations.prepare()
            batches = self.run.batches(self.position.rows_consumed)
            with self.stop.phase("stepping"), contextlib.closing(batches):
                return self._train(batches)
        finally:
            self.watchdog.stop()
            self.saver.close()  # also after an error: what is being saved becomes whole

    def _train(self, batches) -> int:
        progress = show.ProgressLine(self.console, self.last_step)
        steps = config_lib.profiled_steps(self.config)
        profiler = Profiler(steps, self.folder.path / "profile", self.console)
        with progress, jax.transfer_guard("disallow"):
            self.watchdog.start()
            try:
                finished = self._loop(batches, profiler, progress)
                stopped = None
            except Stopped as caught:
                stopped = caught
            finally:
                self.watchdog.stop()  # the last save has its own bound
            profiler.close()
            return self._end(finished) if stopped is None else self._stop_at(stopped)

    def _loop(self, batches, profiler: Profiler, progress: Any) -> bool:
        """To the end; False where a signal was heard on some host before all of it was done."""
        while True:
            self.saver.look()
            stopped, due = self.agreement.anywhere(
                self.stop.name is not None, self.saver.due_by_time()
            )
            stopped = stopped or not self._evaluate()
            if not stopped:
                self._sample()
                self._save(due)
            if stopped or self.position.step >= self.last_step:
                return not stopped
            profiler.before(self.position.step)
            line = self._step(batches)
            profiler.after(self.position.step, self.state)
            if line is not None:
                progress.update(line)

    def _end(self, finished: bool) -> int:
        """The last checkpoint, and what a person wants to see; returns the exit code."""
        with self.stop.phase("finishing"):
            step = self.position.step
            try:
                self._upload_lines()
                self.saver.finish(step, self._checkpoint)
            except SaveFailed as error:
                if finished:
                    raise
                self.events.tell("save_failed", str(error), style="bold red", step=step)
            if not finished:
                self._tell_stopped()
                self.writers.close()
                return EXIT_STOPPED
            self._close()
            path = self.folder.checkpoints / checkpoint_name(step)
            self.console.print(f"finished step {self.last_step:,}; checkpoint {path}")
            return 0

    def _stop_at(self, stopped: Stopped) -> int:
        """Ends a run that should not go on, with a checkpoint from before it went wrong."""
        self.events.tell("stopped", str(stopped), style="bold red", step=stopped.step)
        if stopped.before is not None:
            self._rewind(stopped)
            self.store.keep(stopped.step)
            self._upload_lines()
            self.saver.finish(stopped.step, self._checkpoint)
            for step in self.store.steps():
                if step > stopped.step:  # the next start begins before what went wrong
                    self.store.set_aside(step, ".skipped")
        self._close()
        return 1

    def _rewind(self, stopped: Stopped) -> None:
        """Back to before the updates that were left out: they changed nothing but counters."""
        back = self.position.step - stopped.step
        self.state = rewound(self.state, back)
        self.position.step = stopped.step
        self.position.rows_consumed -= back * self.run.spec.batch_size
        self.losses = LossSums(list(self.run.sources), stopped.before)

    def _close(self) -> None:
        self.writers.close()
        self._draw()

    def _save_first(self) -> None:
        """What a run stopped while it compiles goes on from: whole before that begins."""
        with self.stop.phase("saving"):
            self.saver.finish(self.position.step, self._checkpoint)
            self._say_what_is_safe()

    def _say_what_is_safe(self) -> None:
        """For a signal that comes while there is nothing to save."""
        saved = self.store.steps()
        if saved:
            path = self.folder.checkpoints / checkpoint_name(saved[-1])
            self.stop.safe = f"checkpoint {path} is whole"

    def _cut_back(self) -> dict[str, set[int]]:
        """Drops the metrics past the checkpoint; returns the steps that were evaluated."""
        kept, broken = self.folder.metrics.cut_back(self.position.step)
        if broken:
            self.events.tell(
                "metrics_repaired",
                f"{self.folder.metrics.path}: {broken} broken line(s) removed",
                lines=broken,
            )
        held_out = {line["step"] for line in kept if "eval/loss" in line}
        tasks = {line["step"] for line in kept if any(key.startswith(TASKS) for key in line)}
        return {"held_out": held_out, "tasks": tasks}

    def _due(self, every: int) -> bool:
        step = self.position.step
        return every > 0 and (step % every == 0 or step == self.last_step)

    def _evaluate(self) -> bool:
        """What is due; False where a signal was heard meanwhile and it was left."""
        settings, step, params = self.config.evaluation, self.position.step, self.state.params
        eval_step = self.programs.eval_step
        return self._judge(
            "held_out", settings.every, lambda: self.evaluations.held_out(eval_step, params, step)
        ) and self._judge(
            "tasks", settings.tasks_every, lambda: self.evaluations.tasks(params, step)
        )

    def _judge(self, what: str, every: int, evaluate: Callable[[], Any]) -> bool:
        """One of the two, if due and not done before; whether to go on."""
        step = self.position.step
        if not self._due(every) or distributed.agreed(step in self.evaluated[what]):
            return True
        bound = PATIENCE if what == "tasks" else 0.0
        with self.stop.phase("evaluating"), self.watchdog.patient(bound):
            found = evaluate()
        if found:
            self._write({"step": step, "time": time.time(), **found})
            self._draw()
        self.evaluated[what].add(step)
        return found is not None

    def _left(self) -> bool:
        """Between two batches of an evaluation: whether to leave it for a signal."""
        self.watchdog.moved()
        return distributed.anywhere(self.stop.name is not None)

    def _sample(self) -> None:
        settings = self.config.samples
        if not self._due(settings.every) or self.position.step == 0:
            return
        with self.stop.phase("sampling"):
            texts = self.programs.samples(self.state.params)
        self.watchdog.moved()
        note = show.reading_note(self.run, self.position.rows_consumed)
        show.show_sample(self.console, self.position.step, texts, note)
        whole = "\n\n".join(f"[{prompt}]{text}" for prompt, text in texts.items())
        if distributed.is_first():
            with self._disk_may_be_full("samples"):
                self.folder.write_sample(
                    checkpoint_name(self.position.step), f"{note}\n\n{whole}\n"
                )

    def _save(self, due: bool) -> None:
        """`due`: by time; by steps it may be as well."""
        step = self.position.step
        if jax.process_count() > 1:  # an answer to what was asked before the last save is old
            due = due and step > self.saver.last_step + distributed.Agreement.LAG
        if self._due(self.config.checkpoint.every):
            due = due or step > 0 or self.config.checkpoint.save_initial
        if due and step not in self.store.steps():
            bound = float(self.config.checkpoint.timeout_seconds)
            with self.stop.phase("saving"), self.watchdog.patient(bound):
                self._upload_lines()
                self.saver.save(step, self._checkpoint)

    def _upload_lines(self) -> None:
        """A checkpoint's lines are there before it."""
        if distributed.is_first():
            with self._disk_may_be_full("metrics"):
                self.folder.metrics.flush_to_disk()
            self.folder.uploads.upload()

    def _checkpoint(self) -> Checkpoint:
        self.shards.look()
        return to_checkpoint(self.state, self._run_item())

    def _run_item(self) -> dict[str, Any]:
        """The checkpoint's item `run`: enough to go on, and to use the weights without the run."""
        return self.run.identity() | {
            "step": self.position.step,
            "rows_consumed": self.position.rows_consumed,
            "tokens": self.run.tokens_by_source(self.position.rows_consumed),
            "train_seconds": self.position.train_seconds,
            "loss_sums": self.losses.state(),
            "guard": guard_to_json(self.state.guard),
            "origin": self.run.origin.to_json(),
            "config_changes": self.position.config_changes,
            "config": config_lib.to_dict(self.config),
            "git_commit": git_commit(),
        }

    def _step(self, batches) -> dict[str, Any] | None:
        """One update; returns the metrics line if one is due."""
        began = time.monotonic()
        batch = sharding.put_batch(next(batches), self.run.mesh)
        self.meter.wait_seconds += time.monotonic() - began
        self.state, metrics = self.programs.step(self.state, batch)
        self.watchdog.step(metrics["grad_norm"])
        self.position.step += 1
        self.losses.add(self.position.step, metrics)
        self.position.rows_consumed += self.run.spec.batch_size
        self.meter.steps += 1
        line = None
        if self._due(self.config.training.log_every):
            scalars = {k: v for k, v in metrics.items() if v.ndim == 0}
            line = self._line(jax.device_get(scalars), began)
            self.faults.check(self.losses, self.position.step)
        else:
            self._spend(began)
        self.faults.compare_replicas(self.state, self.position.step)
        return line

    def _spend(self, began: float) -> None:
        self.meter.seconds += time.monotonic() - began
        self.position.train_seconds += time.monotonic() - began

    def _line(self, scalars: Mapping[str, Any], began: float) -> dict[str, Any]:
        """Writes the metrics line of this step; see DESIGN for its keys."""
        means = self.losses.take()  # waits for the devices: time after this is the step's
        self._spend(began)
        position = self.position
        line = {
            "step": position.step,
            "time": time.time(),
            **means,
            **self.meter.line(scalars, position.rows_consumed),
        }
        self._write(line)
        return line

    def _write(self, line: dict[str, Any]) -> None:
        if distributed.is_first():
            with self._disk_may_be_full("metrics"):
                self.folder.metrics.append(line)
            self.writers.write(line)

    @contextlib.contextmanager
    def _disk_may_be_full(self, what: str) -> Iterator[None]:
        """A disk that takes nothing more ends no run; it is told once."""
        try:
            yield
        except OSError as error:
            if what not in self._told:
                self._told.add(what)
                text = f"{what} cannot be written ({error}); the run goes on"
                self.events.tell("disk", text, style="bold red")

    def _draw(self) -> None:
        if distributed.is_first():
            entropies = {name: m.unigram_entropy for name, m in self.run.manifests.items()}
            with self._disk_may_be_full("loss.png"):
                draw_losses(self.folder.metrics.read(), entropies, self.folder.loss_picture)

    def _tell_stopped(self) -> None:
        saved = self.store.steps()
        whole = self.folder.checkpoints / checkpoint_name(saved[-1]) if saved else "none"
        heard = self.stop.name is not None
        who = self.stop.name or "a signal on another host"
        seconds = self.stop.seconds_since() if heard else None
        since = f", {seconds:.1f} s after the signal" if heard else ""
        self.events.tell(
            "stopped",
            f"stopped by {who} after step {self.position.step:,}; checkpoint {whole} is whole"
            f"{since}; run the same command again to go on",
            step=self.position.step,
            by=who,
            seconds=seconds,
        )

    def _hung(self, why: str) -> None:
        """From the watchdog's thread: nobody else may be able to do anything."""
        # Even where the console or the disk is what hangs.
        threading.Timer(4 * HANG_PAUSE, os._exit, (EXIT_STOPPED,)).start()
        step, index = self.position.step, jax.process_index()
        path = self.folder.path / "hang" / f"{checkpoint_name(step)}-process{index}.txt"
        text = f"HUNG in {self.stop.phase_name} at step {step} on process {index}: {why}"
        write_stacks(path, text)
        self.folder.bring(path)
        self.events.tell("hang", f"{text}; see {path}", style="bold red", step=step)
        if index == 0:
            time.sleep(HANG_PAUSE)  # jax ends the others as soon as process 0 is gone
        os._exit(EXIT_STOPPED)
