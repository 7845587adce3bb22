"""The training loop. Its order is fixed, since exact resume rests on it:

    evaluate and sample -> save -> next(batch) -> step

so a checkpoint `global_step<N>` is the state after N updates, before batch N is drawn.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import jax

from stablelm_jax.checkpoint.saving import Content
from stablelm_jax.data.fingerprints import FileFingerprints
from stablelm_jax.parallel import distributed, sharding
from stablelm_jax.run.events import ProgressLine
from stablelm_jax.run.services import Services
from stablelm_jax.training.begin import Beginning, run_item
from stablelm_jax.training.ending import Stopped, end, stop_at
from stablelm_jax.training.faults import Faults
from stablelm_jax.training.intervals import Intervals
from stablelm_jax.training.metrics import LossSums, Meter
from stablelm_jax.training.programs import compile_programs
from stablelm_jax.training.reference import check_start, prepare_reference
from stablelm_jax.training.slow_hosts import SlowHosts
from stablelm_jax.training.state import stored_arrays


class Trainer:
    """One start of a run, from where it begins to its last step or a signal."""

    def __init__(self, beginning: Beginning, services: Services):
        """Raises ShardError where a shard has changed since the run began."""
        self.run, self.services = beginning.run, services
        self.state, self.progress = beginning.state, beginning.progress
        self._resumed, self.last_step = beginning.resumed, self.run.config.training.num_steps
        sources = self.run.sources if self.run.config.data.check_shards else {}
        path = services.folder.path / "shards.json"
        self._shards = FileFingerprints(path, sources, services.events.print)
        self._shards.check()
        self.losses = LossSums(self.run.objective, list(self.run.sources), self.progress.loss_sums)
        self.intervals = Intervals(self.run, services, self.progress.step)
        self._meter = Meter(self.run, services.goodput)
        self._agreement, self._fed_seconds = distributed.Agreement(), 0.0

    def compile(self) -> None:
        """Makes all programs ready, on every process: once the loop runs, nothing is compiled."""
        told = self.services.console, self.services.cache
        self._programs = compile_programs(self.run, *told, self.progress.step)
        self._faults = Faults(self.run, self.services.events)
        self.intervals.prepare(self._programs)
        # Waits for all: to a watchdog, a first step that waits for one who compiles is a hang.
        self._hosts = SlowHosts(self.services.events)

    def train(self) -> int:
        """Runs to the last step; returns the exit code."""
        services = self.services
        services.watchdog.start(self.progress.step)
        if self.run.reference is not None and not self._prepare_reference():
            services.watchdog.stop()
            return end(self, False)
        batches = self.run.batches(self.progress.step)
        line = ProgressLine(services.console, self.last_step)
        with (
            services.stop.phase("stepping"),
            contextlib.closing(batches),
            line.bar,
            jax.transfer_guard("disallow"),
        ):
            finished, stopped = False, None
            try:
                finished = self._loop(batches, line)
            except Stopped as caught:
                stopped = caught
            finally:
                services.watchdog.stop()  # the last save has its own bound
            services.profiler.close()
            return end(self, finished) if stopped is None else stop_at(self, stopped)

    def _prepare_reference(self) -> bool:
        """What DPO compares with; False where a signal was heard before it was there."""
        run, services, eval_step = self.run, self.services, self._programs.eval_step
        own = None if self._resumed else run.joined(self.state)
        with services.stop.phase("reference"):
            if not prepare_reference(run, services, eval_step, own, self.intervals.left):
                return False
            if not self.progress.step:
                with contextlib.closing(run.batches(self.progress.step)) as batches:
                    first = next(batches)
                own = run.joined(self.state) if own is None else own
                services.events.print(check_start(run, eval_step, own, first))
        return True

    def _loop(self, batches, progress_line: ProgressLine) -> bool:
        """To the end; False where a signal was heard on some host before all of it was done."""
        services = self.services
        while True:
            with services.goodput.cause("save"):
                services.saver.look()
            heard, due_here = services.stop.name is not None, services.saver.due_by_time()
            told = self._agreement.gathered(heard, due_here, self._fed_seconds)
            stopped, due = told[:, :2].any(axis=0).tolist()
            self._hosts.add(told[:, 2])
            stopped = stopped or not self.intervals.evaluate(self.state, self.progress)
            if not stopped:
                self.intervals.sample(self.state, self.progress)
                self._save(due)
            if stopped or self.progress.step >= self.last_step:
                return not stopped
            services.profiler.before(self.progress.step)
            line = self._step(batches)
            services.profiler.after(self.progress.step, self.state)
            if line is not None:
                progress_line.update(line)

    def _save(self, due: bool) -> None:
        """`due`: by time; by steps it may be as well."""
        settings, step, services = self.run.config.checkpoint, self.progress.step, self.services
        if jax.process_count() > 1:  # an answer to what was asked before the last save is old
            due = due and step > services.saver.last_step + distributed.Agreement.LAG
        if self.intervals.due(settings.every, step):
            due = due or step > 0 or settings.save_initial
        if due and step not in services.store.steps():
            bound = float(settings.timeout_seconds)
            jax.block_until_ready(self.state)  # saving would wait too: this is the steps' time
            with services.stop.phase("saving"), services.watchdog.patient(bound):
                services.log.flush()  # a checkpoint's lines are there before it
                services.saver.save(step, self.checkpoint)

    def checkpoint(self) -> Content:
        """The present state, for the saver."""
        self._shards.check()
        timers = self.services.goodput.record()
        item = run_item(self.run, self.state, self.progress, self.losses.state(), timers)
        return stored_arrays(self.state), item

    def _step(self, batches) -> dict[str, Any] | None:
        """One update; returns the metrics line if one is due."""
        began = time.monotonic()
        with self.services.goodput.cause("data_wait"):
            batch = sharding.put_batch(next(batches), self.run.mesh)
        self._fed_seconds = time.monotonic() - began
        self.intervals.layer_norms(self.state, batch, self.progress.step + 1)
        self.state, metrics = self._programs.step(self.state, batch)
        self.progress.move(self.run, 1)
        self.services.watchdog.step(self.progress.step, metrics["grad_norm"])
        self.losses.add(self.progress.step, metrics)
        self._meter.steps += 1
        is_due = self.intervals.due(self.run.config.training.log_every, self.progress.step)
        if is_due:
            scalars = jax.device_get({k: v for k, v in metrics.items() if v.ndim == 0})
            means = self.losses.take()  # waits for the devices: the time until here is the step's
            line = {"step": self.progress.step, "time": time.time()}
            line |= means | self._meter.line(scalars, self.progress)
            line |= self._hosts.line(self.progress.step, line["step_seconds"])
            self.services.log.write(line)
            self._faults.check(self.losses, self.progress.step)
        self._faults.compare_replicas(self.state, self.progress.step)
        return line if is_due else None
