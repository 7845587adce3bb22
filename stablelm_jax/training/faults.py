"""Numerical faults: updates that were left out, replicas that drifted apart."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from collections.abc import Sequence

import jax

from stablelm_jax.checkpoint.names import checkpoint_name
from stablelm_jax.checkpoint.replicas import diverged, make_replica_check
from stablelm_jax.run.events import Events
from stablelm_jax.training.ending import Stopped
from stablelm_jax.training.metrics import LossSums, Skipped
from stablelm_jax.training.setup import Run
from stablelm_jax.training.state import TrainState, stored_arrays
from stablelm_jax.training.update_guard import HELD, SPIKE


class Faults:
    """Looks at what steps have left; every process sees the same and raises alike."""

    def __init__(self, run: Run, events: Events):
        self._run, self._events = run, events
        self._most = run.config.training.stop_after_skipped
        self._every = run.config.training.check_replicas_every
        self._compare, self._equal_at = None, None
        self._held = False  # the devices hold all updates back until the run has stopped

    def compile(self) -> None:
        """Makes ready what the run will need."""
        if self._every:
            abstract = stored_arrays(self._run.abstract)
            self._compare = make_replica_check(abstract, self._run.mesh).lower(abstract).compile()

    def check(self, losses: LossSums, step: int) -> None:
        """Tells of each update that was left out.

        Raises:
          Stopped: too many in a row.
        """
        for skipped in losses.take_skipped():
            if skipped.why == HELD:
                self._held = True
            else:
                self._tell(skipped)
        if losses.in_a_row >= self._most or self._held:
            whole = step - losses.in_a_row
            raise Stopped(
                f"{losses.in_a_row} updates in a row were left out, steps {whole + 1} to {step}; "
                f"the checkpoint {checkpoint_name(whole)} is from before them. Look at what the "
                f"first of them read: {inspection_command(whole + 1)}\nThen run the same command "
                "again, or start a branch of that checkpoint with a lower learning rate or other "
                "data",
                whole,
                losses.before_row,
            )

    def _tell(self, skipped: Skipped) -> None:
        self._held |= skipped.why == SPIKE and self._run.config.guard.kind == "stop"
        what = "a spike of the loss" if skipped.why == SPIKE else "loss or gradient not finite"
        sources = ", ".join(
            f"{name} {'not finite' if loss is None else format(loss, '.4f')}"
            for name, loss in skipped.sources.items()
        )
        fields = dataclasses.asdict(skipped) | {"grad_norm": repr(skipped.grad_norm)}
        fields["why"] = "spike" if skipped.why == SPIKE else "not finite"
        text = f"step {skipped.step}: update left out ({what}; loss by source: {sources})"
        self._events.tell("update_skipped", text, **fields)

    def compare_replicas(self, state: TrainState, step: int) -> None:
        """Every `training.check_replicas_every` steps: waits for the devices.

        Raises:
          Stopped: devices that should hold the same bits do not.
        """
        if self._compare is None or step % self._every:
            return
        sums = jax.device_get(self._compare(stored_arrays(state)))
        odd = diverged(sums, stored_arrays(self._run.abstract), self._run.mesh)
        if odd:
            devices = sorted({number for numbers in odd.values() for number in numbers})
            before = "before this start" if self._equal_at is None else f"at step {self._equal_at}"
            names = [str(self._run.mesh.devices.flat[number]) for number in devices]
            raise Stopped(
                f"step {step}: replicas hold different bits of {', '.join(list(odd)[:5])}"
                f"{' and others' if len(odd) > 5 else ''} on {', '.join(names)}: one of these "
                f"devices computes wrongly. They were last seen equal {before}: rename the "
                "checkpoints after that, take the machine out, and run the same command again",
                step,
                None,
            )
        self._equal_at = step


def inspection_command(step: int, arguments: Sequence[str] | None = None) -> str:
    """What shows the documents of a step of this run; `arguments`: of this process."""
    given, kept = list(sys.argv[1:] if arguments is None else arguments), []
    while given:
        argument = given.pop(0)
        if re.match("--?(no)?(config|workdir)\\b", argument):
            kept.append(argument)
            if "=" not in argument and given and not given[0].startswith("-"):
                kept.append(given.pop(0))
    return shlex.join(["python", "-m", "stablelm_jax.inspect_data", *kept, f"--step={step}"])
