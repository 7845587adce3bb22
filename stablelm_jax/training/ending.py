"""How a run ends: at its last step, by a signal, or because it should not go on."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from stablelm_jax.checkpoint.names import checkpoint_name
from stablelm_jax.checkpoint.saving import SaveFailed
from stablelm_jax.run.signals import EXIT_STOPPED
from stablelm_jax.training.metrics import LossSums
from stablelm_jax.training.update_guard import without_row

if TYPE_CHECKING:
    from stablelm_jax.training.loop import Trainer


class Stopped(Exception):
    """The run should not go on by itself. The text says why, and what to do.

    Attributes:
      step: updates done before it went wrong.
      before: `LossSums.state()` of then, or None where the present state is not to be saved.
    """

    def __init__(self, text: str, step: int, before: dict[str, Any] | None):
        super().__init__(text)
        self.step, self.before = step, before


def end(trainer: Trainer, finished: bool) -> int:
    """The last checkpoint, and what a person wants to see; returns the exit code."""
    services, step = trainer.services, trainer.progress.step
    jax.block_until_ready(trainer.state)
    with services.stop.phase("finishing"):
        try:
            services.log.flush()
            services.saver.finish(step, trainer.checkpoint)
        except SaveFailed as error:
            if finished:
                raise
            services.events.tell("save_failed", str(error), style="bold red", step=step)
        services.console.print(str(services.goodput), soft_wrap=True)
        if not finished:
            _tell_stopped(trainer)
            return EXIT_STOPPED
        trainer.intervals.draw(at_end=True)
        path = services.folder.checkpoints / checkpoint_name(step)
        services.console.print(f"finished step {trainer.last_step:,}; checkpoint {path}")
        return 0


def _tell_stopped(trainer: Trainer) -> None:
    services, step = trainer.services, trainer.progress.step
    saved = services.store.steps()
    whole = services.folder.checkpoints / checkpoint_name(saved[-1]) if saved else "none"
    who, seconds, since = "a signal on another host", None, ""
    if services.stop.name is not None:
        who, seconds = services.stop.name, services.stop.seconds_since()
        since = f", {seconds:.1f} s after the signal"
    text = f"stopped by {who} after step {step:,}; checkpoint {whole} is whole{since}"
    again = "run the same command again to go on"
    services.events.tell("stopped", f"{text}; {again}", step=step, by=who, seconds=seconds)


def stop_at(trainer: Trainer, stopped: Stopped) -> int:
    """Ends a run that should not go on, with a checkpoint from before it went wrong."""
    services = trainer.services
    services.events.tell("stopped", str(stopped), style="bold red", step=stopped.step)
    if stopped.before is not None:
        _rewind(trainer, stopped)
        services.store.keep(stopped.step)
        services.log.flush()
        services.saver.finish(stopped.step, trainer.checkpoint)
        for step in services.store.steps():
            if step > stopped.step:  # the next start begins before what went wrong
                services.store.set_aside(step, ".skipped")
    trainer.intervals.draw()
    return 1


def _rewind(trainer: Trainer, stopped: Stopped) -> None:
    """Back to before the updates that were left out: they changed nothing but counters."""
    run, state, steps = trainer.run, trainer.state, trainer.progress.step - stopped.step

    def less(counter: jax.Array) -> jax.Array:
        value = np.int32(int(jax.device_get(counter)) - steps)
        return jax.device_put(value, counter.sharding)

    trainer.losses = LossSums(run.objective, list(run.sources), stopped.before)
    trainer.progress.move(run, -steps)
    trainer.state = dataclasses.replace(
        state,
        step=less(state.step),
        updates_skipped=less(state.updates_skipped),
        guard=without_row(state.guard),
    )
