"""Numerical faults: updates that were left out, replicas that drifted apart.

A chip that computes wrongly now and then does not crash: its copy of the weights drifts from the
others'. What is split over every axis has no second copy and cannot be compared: with ZeRO-1 and
one group of devices that is nearly all, so the check is for `parallel.replica` above 1, for
`parallel.zero1=False`, and for what ZeRO-1 leaves whole.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from stablelm_jax.checkpoint.checksum import leaf_checksum
from stablelm_jax.checkpoint.names import checkpoint_name
from stablelm_jax.model.parameters import flatten
from stablelm_jax.run.events import Events
from stablelm_jax.training.ending import Stopped
from stablelm_jax.training.metrics import LossSums, Skipped
from stablelm_jax.training.setup import Run
from stablelm_jax.training.state import TrainState, stored_arrays
from stablelm_jax.training.update_guard import HELD, SPIKE


class Faults:
    """Looks at what steps have left; every process sees the same and raises alike."""

    def __init__(self, run: Run, events: Events):
        """Compiles what the run will need."""
        self._run, self._events = run, events
        self._most = run.config.training.stop_after_skipped
        self._held = False  # the devices hold all updates back until the run has stopped
        self._every = run.config.training.check_replicas_every
        self._compare, self._equal_at = None, None
        if self._every:
            abstract = stored_arrays(run.abstract)
            self._compare = make_replica_check(abstract, run.mesh).lower(abstract).compile()

    def check(self, losses: LossSums, step: int) -> None:
        """Tells of each update that was left out; raises Stopped after too many in a row."""
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
        """Waits for the devices, every so many steps; raises Stopped where their bits differ."""
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


def make_replica_check(abstract: Any, mesh: Mesh) -> Any:
    """Jitted f(tree) -> {leaf name: uint32 [devices]}: the checksum of each device's own part.

    `abstract`: a nested dict of `ShapeDtypeStruct`s with their shardings on `mesh`. Devices are in
    the order of the mesh.
    """

    def gathered_sums(tree):
        sums = jnp.stack([leaf_checksum(leaf) for leaf in flatten(tree).values()])
        by_device = jax.lax.all_gather(sums, mesh.axis_names).reshape(mesh.size, -1)
        return dict(zip(flatten(tree), by_device.T))

    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, abstract)
    placed = dict(mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec())
    return jax.jit(jax.shard_map(gathered_sums, **placed, check_vma=False))


def diverged(sums: Any, abstract: Any, mesh: Mesh) -> dict[str, list[int]]:
    """{leaf name: numbers of the devices whose bits are not those of most others}.

    Where two copies disagree nobody knows which is right: both are named.
    """
    found = {}
    for name, leaf in flatten(abstract).items():
        places = leaf.sharding.devices_indices_map(leaf.shape)
        copies = defaultdict(list)  # part of the leaf -> [(device's number, checksum)]
        for number, device in enumerate(mesh.devices.flat):
            copies[str(places[device])].append((number, int(sums[name][number])))
        odd = []
        for held in copies.values():
            (usual, count), *others = Counter(value for _, value in held).most_common()
            known = not others or 2 * count > len(held)
            odd += [number for number, value in held if value != usual or not known]
        if odd:
            found[name] = sorted(odd)
    return found


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
