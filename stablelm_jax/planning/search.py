"""Ways to divide a step on a target, and which of them are worth compiling.

Tried are rows of a microbatch (powers of two), remat, sizes of the mesh axis `model` and, where it
can help, FSDP. The most promising by the estimate comes first, and most are never compiled:

* what cannot fit by its shapes alone (`estimate.least_bytes`);
* as many rows or more, with as little remat or less, than what was found not to fit;
* fewer rows than what fits: the same work in more microbatches;
* what the estimate puts more than half again behind the best that fits.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from stablelm_jax import config as config_lib
from stablelm_jax.planning.compile import CompiledStep, DoesNotFit, compile_for
from stablelm_jax.planning.estimate import StepTime, least_bytes, step_time
from stablelm_jax.planning.layout import Layout, layout_of
from stablelm_jax.planning.targets import Target

_REMAT = ("full", "attention", "dots", "none")  # from the least memory to the most
_SLACK = 1.5  # of the best estimate that fits; estimates are hoped to err by less, one to another

Compile = Callable[[ConfigDict, Target], CompiledStep]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to divide a step: its time by the estimate, and the bytes that it needs at least."""

    layout: Layout
    expected: StepTime
    needed: float

    @property
    def settings(self) -> dict[str, Any]:
        """Config key -> value."""
        layout = self.layout
        return _settings(layout.accumulation, layout.remat, layout.model, layout.fsdp)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What compiling gave: a step that fits and its estimated time, or else the problem.

    Attributes:
      too_large: the problem is memory, so what needs more will not fit either.
    """

    candidate: Candidate
    step: CompiledStep | None = None
    time: StepTime | None = None
    problem: str = ""
    too_large: bool = False


def candidates(config: ConfigDict, target: Target) -> list[Candidate]:
    """All ways to divide a step of `config` on `target`, the least estimated time first.

    Raises:
      ConfigError: the batch cannot be divided over the devices in any of them.
    """
    replica = config.parallel.replica
    found = [
        _candidate(config, target, _settings(accumulation, remat, model, fsdp))
        for model in _model_sizes(config, target)
        if target.num_devices % (model * replica) == 0
        for accumulation in _accumulations(config.data.batch_size, target.num_devices // model)
        for remat in _REMAT
        for fsdp in (False, True)
        if not fsdp or _fsdp_helps(config, target.num_devices // model // replica, remat)
    ]
    if not found:
        raise config_lib.ConfigError(
            f"config.data.batch_size={config.data.batch_size}: does not divide over the "
            f"{target.num_devices} devices of {target}, whatever parallel.model is; use a "
            "multiple of their number, or another --target"
        )
    return sorted(found, key=lambda c: (c.expected.total, c.needed))


def _settings(accumulation: int, remat: str, model: int, fsdp: bool) -> dict[str, Any]:
    return {
        "training.accumulation": accumulation,
        "training.remat": remat,
        "parallel.data": -1,
        "parallel.model": model,
        "parallel.fsdp": fsdp,
    }


def _candidate(config: ConfigDict, target: Target, settings: dict[str, Any]) -> Candidate:
    layout = layout_of(divided(config, settings), target.num_devices)
    return Candidate(layout, step_time(layout, target), least_bytes(layout))


def divided(config: ConfigDict, settings: dict[str, Any]) -> ConfigDict:
    """A copy of `config` with `settings`."""
    config = copy.deepcopy(config)
    for key, value in settings.items():
        config_lib.set_value(config, key, value)
    return config


def _model_sizes(config: ConfigDict, target: Target) -> list[int]:
    """Sizes of `model` that stay in a host and divide what is split over it."""
    per_host = target.num_devices // target.num_hosts
    names = ("num_heads", "num_kv_heads", "feed_forward_width", "vocab_size")
    split = [per_host, *(config.model[name] for name in names)]
    return [m for m in range(1, per_host + 1) if not any(size % m for size in split)]


def _accumulations(batch_size: int, data: int) -> Iterator[int]:
    """Microbatches of a step such that a microbatch has 1, 2, 4, ... rows on a device."""
    rows = 1
    while batch_size % (data * rows) == 0:
        yield batch_size // (data * rows)
        rows *= 2


def _fsdp_helps(config: ConfigDict, data: int, remat: str) -> bool:
    return data > 1 and config.parallel.zero1 and remat != "none"


def search(
    config: ConfigDict,
    target: Target,
    ordered: Sequence[Candidate],
    compile_one: Compile = compile_for,
) -> Iterator[Outcome]:
    """Compiles candidates in turn, leaving out what the module's text says.

    Raises:
      CompilerError: the target's compiler is not installed.
    """
    outcomes: list[Outcome] = []
    for candidate in ordered:
        if _worth_compiling(candidate, target, outcomes):
            outcomes.append(_try(candidate, config, target, compile_one))
            yield outcomes[-1]


def _worth_compiling(candidate: Candidate, target: Target, outcomes: Sequence[Outcome]) -> bool:
    if candidate.needed > target.available_bytes:
        return False
    for outcome in outcomes:
        if outcome.too_large and _needs_more(candidate.layout, outcome.candidate.layout):
            return False
        if outcome.time is None:
            continue
        if _has_fewer_rows(candidate.layout, outcome.candidate.layout):
            return False
        if candidate.expected.total > _SLACK * outcome.time.total:
            return False
    return True


def _has_fewer_rows(layout: Layout, other: Layout) -> bool:
    same = (layout.model, layout.fsdp, layout.remat) == (other.model, other.fsdp, other.remat)
    return same and layout.rows < other.rows


def _needs_more(layout: Layout, too_large: Layout) -> bool:
    return (
        (layout.model, layout.fsdp) == (too_large.model, too_large.fsdp)
        and layout.rows >= too_large.rows
        and _REMAT.index(layout.remat) >= _REMAT.index(too_large.remat)
    )


def _try(candidate: Candidate, config: ConfigDict, target: Target, compile_one) -> Outcome:
    try:
        step = compile_one(divided(config, candidate.settings), target)
    except DoesNotFit as error:
        return Outcome(candidate, problem=str(error), too_large=True)
    except jax.errors.JaxRuntimeError as error:  # one that the compiler cannot do ends no sweep
        return Outcome(candidate, problem=str(error).splitlines()[0][:200])
    return Outcome(candidate, step, step_time(candidate.layout, target, step.collectives))
