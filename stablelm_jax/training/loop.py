"""The training loop. Its order is fixed, since exact resume rests on it:

    evaluate and sample -> save -> next(batch) -> step

so a checkpoint `global_step<N>` is the state after N updates, before batch N is drawn.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console

from stablelm_jax import config as config_lib
from stablelm_jax.checkpoint.names import branch_name
from stablelm_jax.checkpoint.store import CheckpointStore, read_arrays, read_run
from stablelm_jax.evaluation.held_out import evaluate_held_out
from stablelm_jax.generation.sampler import sample_texts
from stablelm_jax.kernels.check import WrongKernel
from stablelm_jax.model.flops import train_flops_per_token
from stablelm_jax.model.parameters import count_parameters
from stablelm_jax.parallel import distributed, sharding
from stablelm_jax.training import console as show
from stablelm_jax.training.compilation_cache import CompilationCache
from stablelm_jax.training.metrics import LossSums, peak_flops
from stablelm_jax.training.picture import draw_losses
from stablelm_jax.training.profile import Profiler
from stablelm_jax.training.resume import Position, check_same_run, from_arrays, to_checkpoint
from stablelm_jax.training.run_folder import RunFolder
from stablelm_jax.training.setup import Run, prepare_run
from stablelm_jax.training.signals import EXIT_STOPPED, StopRequest
from stablelm_jax.training.state import TrainState, init_state
from stablelm_jax.training.writers import Writers

YOUNG = 1.0  # tokens read for each parameter; before that nobody should expect language


def run_training(config: ConfigDict, set_by: dict[str, str], workdir: str) -> int:
    """Trains `config` in the folder `workdir`; returns the exit code.

    Args:
      set_by: where each config value was set, for the run folder.

    Raises:
      ValueError: config, data or checkpoint do not fit; nothing is lost.
    """
    console = Console(quiet=not distributed.is_first())
    with StopRequest() as stop:
        cache = CompilationCache(workdir)
        run = prepare_run(config)
        folder = RunFolder(workdir)
        with _claimed(folder):
            show.show_decisions(console, run)
            console.print(f"run folder: {folder}", soft_wrap=True)
            trainer = Trainer(run, folder, console, cache)
            if distributed.is_first():
                folder.write_config(config_lib.to_dict(config), set_by)
                folder.add_environment()
            return trainer.train(stop)


@contextlib.contextmanager
def _claimed(folder: RunFolder) -> Iterator[None]:
    """The folder, made and held by process 0; nobody goes on without it."""
    with contextlib.ExitStack() as stack:
        error = None
        if distributed.is_first():
            try:
                folder.create()
                stack.enter_context(folder.claimed())
            except (ValueError, OSError) as caught:
                error = caught
        if distributed.agreed(error is not None):
            raise error or ValueError("process 0 could not take the run folder; see its output")
        yield


def _checked_attention(run: Run) -> str:
    """Which attention runs; an error on every host where it is wrong, or fails, on one."""
    text, error = "", None
    try:
        text = run.check_attention()
    except Exception as caught:  # whatever it is, the others would wait for this host
        error = caught
    if distributed.anywhere(error is not None):
        raise error or WrongKernel("attention is wrong on another host; see its output")
    return text


class Trainer:
    """One start of a run, from its newest checkpoint to its last step or a signal."""

    def __init__(self, run: Run, folder: RunFolder, console: Console, cache: CompilationCache):
        self.run, self.folder, self.console, self.cache = run, folder, console, cache
        self.config = run.config
        self.last_step = run.config.training.num_steps
        self.store = CheckpointStore(
            folder.checkpoints,
            keep_latest=self.config.checkpoint.keep_latest,
            keep_every=self.config.checkpoint.keep_every,
        )
        self.state, self.position = self._start()
        self.losses = LossSums(list(run.sources), self.position.loss_sums)
        self.evaluated_steps = self._cut_back() if distributed.is_first() else set()
        self.writers = Writers(self.config, folder)
        self._steps_since_line, self._seconds, self._wait_seconds = 0, 0.0, 0.0

    def train(self, stop: StopRequest) -> int:
        """Runs to the last step; returns the exit code."""
        step_function = self._compile()
        batches = self.run.batches(self.position.rows_consumed)
        progress = show.ProgressLine(self.console, self.last_step)
        steps = config_lib.profiled_steps(self.config)
        profiler = Profiler(steps, self.folder.path / "profile", self.console)
        with progress, jax.transfer_guard("disallow"):
            while True:
                stopped = distributed.anywhere(stop.name is not None)
                if not stopped:
                    self._evaluate()
                    self._sample()
                self._save(force=stopped)
                if self.position.step == self.last_step or stopped:
                    break
                profiler.before(self.position.step)
                line = self._step(step_function, batches)
                profiler.after(self.position.step, self.state)
                if line is not None:
                    progress.update(line)
        profiler.close()
        self.store.close()
        self.writers.close()
        batches.close()
        self._draw()
        return self._farewell(stop)

    def _cut_back(self) -> set[int]:
        """Drops the metrics past the checkpoint; returns the steps that were evaluated."""
        kept = self.folder.metrics.cut_back(self.position.step)
        return {line["step"] for line in kept if "eval/loss" in line}

    def _start(self) -> tuple[TrainState, Position]:
        newest = self.store.latest()
        if newest is None:
            self.console.print("starting from fresh weights")
            state = init_state(
                self.run.model, self.run.optimizer, self.run.abstract, self.config.seed
            )
            return state, Position()
        path = self.folder.checkpoints / branch_name(newest)
        self.console.print(f"resuming from {path}")
        return restore(self.run, path)

    def _compile(self):
        self.console.print(_checked_attention(self.run), markup=False, soft_wrap=True)
        began = time.monotonic()
        with self.console.status("compiling the train step"):
            step_function = self.run.compile_step()
        seconds = time.monotonic() - began
        self.console.print(f"the train step was ready after {seconds:.1f} s; {self.cache}")
        return step_function

    def _due(self, every: int) -> bool:
        step = self.position.step
        return every > 0 and (step % every == 0 or step == self.last_step)

    def _evaluate(self) -> None:
        step = self.position.step
        if not self._due(self.config.evaluation.every):
            return
        if distributed.agreed(step in self.evaluated_steps):
            return
        means = evaluate_held_out(
            self.run.eval_step,
            self.state.params,
            self.run.held_out(),
            self.run.held_out_tokens_per_byte(),
            self.run.mesh,
        )
        self._write({"step": step, "time": time.time(), **means})
        self.evaluated_steps.add(step)
        show.show_evaluation(self.console, self.run, step, means)
        self._draw()

    def _sample(self) -> None:
        settings = self.config.samples
        if not self._due(settings.every) or self.position.step == 0:
            return
        texts = sample_texts(
            self.run.model,
            self.state.params,
            self.run.tokenizer,
            settings.prompts,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=self.config.seed,
            dtype=self.run.dtype,
        )
        note = self._reading()
        show.show_sample(self.console, self.position.step, texts, note)
        whole = "\n\n".join(f"[{prompt}]{text}" for prompt, text in texts.items())
        if distributed.is_first():
            self.folder.write_sample(branch_name(self.position.step), f"{note}\n\n{whole}\n")

    def _reading(self) -> str:
        """How much the model has read, for whoever reads its samples."""
        tokens = self.position.rows_consumed * self.run.spec.sequence_length
        share = tokens / count_parameters(self.run.model)
        note = f"{share:.2g} tokens read for each parameter"
        return f"{note}: not yet language" if share < YOUNG else note

    def _save(self, force: bool) -> None:
        step, every = self.position.step, self.config.checkpoint.every
        due = self._due(every) and (step > 0 or self.config.checkpoint.save_initial)
        if (due or force) and step not in self.store.steps():
            if distributed.is_first():  # a checkpoint's lines are there before it
                self.folder.uploads.upload()
            self.store.save(step, to_checkpoint(self.state, self._run_item()))

    def _run_item(self) -> dict[str, Any]:
        """The checkpoint's item `run`: enough to go on, and to use the weights without the run."""
        return self.run.identity() | {
            "step": self.position.step,
            "rows_consumed": self.position.rows_consumed,
            "tokens": self.run.tokens_by_source(self.position.rows_consumed),
            "train_seconds": self.position.train_seconds,
            "loss_sums": self.losses.state(),
            "config": config_lib.to_dict(self.config),
        }

    def _step(self, step_function, batches) -> dict[str, Any] | None:
        """One update; returns the metrics line if one is due."""
        began = time.monotonic()
        batch = sharding.put_batch(next(batches), self.run.mesh)
        self._wait_seconds += time.monotonic() - began
        self.state, metrics = step_function(self.state, batch)
        self.losses.add(metrics)
        self.position.step += 1
        self.position.rows_consumed += self.run.spec.batch_size
        self._steps_since_line += 1
        line = None
        if self._due(self.config.training.log_every):
            scalars = {k: v for k, v in metrics.items() if v.ndim == 0}
            line = self._line(jax.device_get(scalars), began)
        else:
            self._spend(began)
        return line

    def _spend(self, began: float) -> None:
        self._seconds += time.monotonic() - began
        self.position.train_seconds += time.monotonic() - began

    def _line(self, scalars: Mapping[str, Any], began: float) -> dict[str, Any]:
        """Writes the metrics line of this step; see DESIGN for its keys."""
        means = self.losses.take()  # waits for the devices: time after this is the step's
        self._spend(began)
        ledger = self.run.tokens_by_source(self.position.rows_consumed)
        line = {
            "step": self.position.step,
            "time": time.time(),
            **means,
            **{key: scalars[key].item() for key in ("learning_rate", "grad_norm", "param_norm")},
            "updates_skipped": scalars["updates_skipped"].item(),
            "tokens_seen": sum(ledger.values()),
            **{f"tokens/{name}": tokens for name, tokens in ledger.items()},
            **{
                f"epochs/{name}": ledger[name] / manifest.train.tokens
                for name, manifest in self.run.manifests.items()
            },
            **self._speed(),
        }
        self._write(line)
        self._steps_since_line, self._seconds, self._wait_seconds = 0, 0.0, 0.0
        return line

    def _speed(self) -> dict[str, float | None]:
        spec, steps = self.run.spec, self._steps_since_line
        rate = steps * spec.batch_size * spec.sequence_length / self._seconds
        per_device = rate / jax.device_count()
        peak = peak_flops(jax.devices()[0])

        def mfu(causal: bool) -> float | None:
            flops = train_flops_per_token(self.run.model, spec.sequence_length, causal=causal)
            return None if peak is None else per_device * flops / peak

        return {
            "tokens_per_second": rate,
            "tokens_per_second_per_device": per_device,
            "mfu": mfu(causal=False),
            "mfu_causal": mfu(causal=True),
            "data_wait_seconds": self._wait_seconds / steps,
            "step_seconds": self._seconds / steps,
        }

    def _write(self, line: dict[str, Any]) -> None:
        if distributed.is_first():
            self.folder.metrics.append(line)
            self.writers.write(line)

    def _draw(self) -> None:
        if distributed.is_first():
            entropies = {name: m.unigram_entropy for name, m in self.run.manifests.items()}
            draw_losses(self.folder.metrics.read(), entropies, self.folder.loss_picture)

    def _farewell(self, stop: StopRequest) -> int:
        path = self.folder.checkpoints / branch_name(self.position.step)
        if self.position.step == self.last_step:
            self.console.print(f"finished step {self.last_step:,}; checkpoint {path}")
            return 0
        who = stop.name or "a signal on another host"
        self.console.print(
            f"stopped by {who} after step {self.position.step:,}; checkpoint {path} is whole; "
            "run the same command again to go on"
        )
        return EXIT_STOPPED


def restore(run: Run, path: Any) -> tuple[TrainState, Position]:
    """State and position of the checkpoint at `path`, placed on this run's mesh."""
    saved = read_run(path)
    check_same_run(saved, run.identity())
    wanted = to_checkpoint(run.abstract, {})
    arrays = read_arrays(path, {"params": wanted.params, "optimizer": wanted.optimizer}, saved)
    step = jax.device_put(saved["step"], sharding.replicated(run.mesh))
    blank = TrainState(step.astype("int32"), step, None, run.abstract.opt_state)
    state = from_arrays(blank, arrays)
    keys = ("step", "rows_consumed", "train_seconds", "loss_sums")
    return state, Position(**{key: saved[key] for key in keys})
