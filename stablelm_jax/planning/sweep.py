"""`plan --sweep`: which way to divide a step on a target is the fastest, by an estimate.

Tried are rows of a microbatch (powers of two), remat, sizes of the mesh axis `model` and, where it
can help, FSDP. The most promising by the estimate is compiled first, and most never are:

* what cannot fit by its shapes alone (`estimate.least_bytes`);
* what needs more than something that did not fit: as many rows or more, as little remat or less;
* fewer rows than what fits: the same work in more microbatches;
* what the estimate puts more than half again behind the best that fits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.table import Table

from stablelm_jax import config as config_lib
from stablelm_jax.model.flops import train_flops_per_token
from stablelm_jax.planning.compile import CompiledStep, DoesNotFit, compile_for
from stablelm_jax.planning.estimate import (
    FORMULA,
    Layout,
    StepTime,
    divided,
    layout_of,
    least_bytes,
    mode_text,
    step_time,
)
from stablelm_jax.planning.report import table
from stablelm_jax.planning.targets import GIB, Target
from stablelm_jax.run.console import make_console

_REMAT = ("full", "attention", "dots", "none")  # from the least memory to the most
_SLACK = 1.5  # estimates may err, but hardly by that much against each other

Compile = Callable[[ConfigDict, Target], CompiledStep]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to divide a step, and what compiling it gave: a step that fits, or the problem."""

    settings: dict[str, Any]  # config key -> value
    layout: Layout
    needed: float  # bytes of a device, at least
    time: StepTime  # estimated, from the shapes alone until the step is compiled
    step: CompiledStep | None = None
    problem: Exception | None = None


def sweep(config: ConfigDict, target: Target, compile_one: Compile = compile_for) -> None:
    """Prints each result as it comes and the ranking of what fits, for the largest batch.

    Raises:
      ConfigError, CompilerError: as `compile_for`.
      DoesNotFit: nothing fits.
      KeyboardInterrupt: after the first Ctrl-C, when what was done is ranked.
    """
    console = make_console(file_width=140)
    config = config_lib.largest_step(config)
    ordered = candidates(config, target)
    hopeless = sum(candidate.needed > target.available_bytes for candidate in ordered)
    available = f"{target.available_bytes / GIB:.1f} GiB"
    console.print(
        f"{len(ordered)} ways to divide a step on {target}; {hopeless} need more than its "
        f"{available} by their shapes alone. Ctrl-C ranks what is done."
    )
    tried, interrupted = [], False
    try:
        with console.status("compiling, the most promising first"):
            for candidate in search(config, target, ordered, _aside(compile_one)):
                tried.append(candidate)
                console.print(_line(len(tried), candidate), soft_wrap=True, highlight=False)
    except KeyboardInterrupt:
        interrupted = True
        console.print(f"interrupted: {len(tried)} compiled; ranked are those that fit")
    if ranked := sorted((c for c in tried if c.step), key=lambda c: sum(c.time)):
        console.print(_ranking(config, target, ranked))
        console.print("the best by this estimate:")
        console.print(overrides(ranked[0]), soft_wrap=True, highlight=False)
    elif not interrupted:
        least = min(candidate.needed for candidate in ordered) / GIB
        last = f"; the last that was compiled: {tried[-1].problem}" if tried else ""
        raise DoesNotFit(
            f"{target}: nothing fits: of {len(ordered)} ways to divide the step, the smallest "
            f"needs at least {least:.1f} of {available} by its shapes alone; use more devices, a "
            f"chip with more memory or a shorter data.sequence_length{last}"
        )
    if interrupted:
        raise KeyboardInterrupt


def _aside(compile_one: Compile) -> Compile:
    """In a thread: a compiler at work in this one, or a wait without end, hears no Ctrl-C."""
    compiler = ThreadPoolExecutor(1)

    def compile_aside(config: ConfigDict, target: Target) -> CompiledStep:
        compiled = compiler.submit(compile_one, config, target)
        while not compiled.done():
            wait([compiled], timeout=0.2)
        return compiled.result()

    return compile_aside


def candidates(config: ConfigDict, target: Target) -> list[Candidate]:
    """All ways to divide a step of `config` on `target`, the least estimated time first.

    Raises:
      ConfigError: the batch cannot be divided over the devices in any of them.
    """
    found = []
    for settings in _all_settings(config, target):
        layout = layout_of(divided(config, settings), target.num_devices)
        found.append(Candidate(settings, layout, least_bytes(layout), step_time(layout, target)))
    if not found:
        raise config_lib.ConfigError(
            f"config.data.batch_size={config.data.batch_size}: does not divide over the "
            f"{target.num_devices} devices of {target}, whatever parallel.model is; use a "
            "multiple of their number, or another --target"
        )
    return sorted(found, key=lambda c: (sum(c.time), c.needed))


def _all_settings(config: ConfigDict, target: Target) -> Iterator[dict[str, Any]]:
    replica, batch_size = config.parallel.replica, config.data.batch_size
    fit_data = {} if config.parallel.data == -1 else {"parallel.data": -1}
    per_host = target.num_devices // target.num_hosts
    split = ("num_heads", "num_kv_heads", "feed_forward_width", "vocab_size")
    for model in range(1, per_host + 1):  # it stays in a host
        sizes = (per_host, *(config.model[name] for name in split))
        if any(size % model for size in sizes) or target.num_devices % (model * replica):
            continue
        batch_parts = rows = target.num_devices // model
        while batch_size % rows == 0:  # a microbatch has 1, 2, 4, ... rows on a device
            for remat in _REMAT:
                fsdp_helps = batch_parts > replica and config.parallel.zero1 and remat != "none"
                for fsdp in (False, True) if fsdp_helps else (False,):
                    yield fit_data | {
                        "training.accumulation": batch_size // rows,
                        "training.remat": remat,
                        "parallel.model": model,
                        "parallel.fsdp": fsdp,
                    }
            rows *= 2


def search(
    config: ConfigDict, target: Target, ordered: Sequence[Candidate], compile_one: Compile
) -> Iterator[Candidate]:
    """Compiles candidates in turn, leaving out what the module's text says."""
    tried: list[Candidate] = []
    for candidate in ordered:
        hopeless = candidate.needed > target.available_bytes
        if hopeless or any(_rules_out(other, candidate) for other in tried):
            continue
        try:
            step = compile_one(divided(config, candidate.settings), target)
            time = step_time(candidate.layout, target, step.collectives)
            tried.append(dataclasses.replace(candidate, step=step, time=time))
        except (DoesNotFit, jax.errors.JaxRuntimeError) as error:  # neither ends the sweep
            tried.append(dataclasses.replace(candidate, problem=error))
        yield tried[-1]


def _rules_out(tried: Candidate, new: Candidate) -> bool:
    """Whether compiling `new` can bring nothing, after what `tried` gave."""
    old, layout = tried.layout, new.layout
    alike = (layout.model, layout.fsdp) == (old.model, old.fsdp)
    if isinstance(tried.problem, DoesNotFit):
        more_kept = _REMAT.index(layout.remat) >= _REMAT.index(old.remat)
        return alike and more_kept and layout.rows >= old.rows
    if tried.problem:
        return False
    fewer_rows = alike and layout.remat == old.remat and layout.rows < old.rows
    return fewer_rows or sum(new.time) > _SLACK * sum(tried.time)


def overrides(candidate: Candidate) -> str:
    """The flags that make the config divide its step like `candidate`."""
    return " ".join(f"--config.{key}={value}" for key, value in candidate.settings.items())


def _line(number: int, candidate: Candidate) -> str:
    layout, step = candidate.layout, candidate.step
    if step is None:
        result = str(candidate.problem).splitlines()[0].split("; try ")[0][:200]
    else:
        result = (
            f"{step.peak_bytes / GIB:6.1f} of {step.target.available_bytes / GIB:.1f} GiB  "
            f"{sum(candidate.time):8.4g} s estimated  (compiled in {step.seconds:.0f} s)"
        )
    return (
        f"{number:3}  model {layout.model}  {mode_text(layout):6}  remat {layout.remat:4}  "
        f"{layout.rows:3} rows x {layout.accumulation:<4}  {result}"
    )


def _ranking(config: ConfigDict, target: Target, ranked: Sequence[Candidate]) -> Table:
    model, length = ranked[0].layout.sizes, ranked[0].layout.sequence_length
    flops = train_flops_per_token(model, length, causal=False) * config_lib.tokens_per_step(config)
    peak, rows = target.num_devices * target.peak_flops, []
    for candidate in ranked:
        layout, time, step = candidate.layout, candidate.time, candidate.step
        sent = sum(found.sent for found in step.collectives)
        how = (layout.model, mode_text(layout), layout.rows, layout.accumulation, layout.remat)
        bytes_ = (f"{step.peak_bytes / GIB:.1f}", f"{sent / 1e9:.2f}")
        parts = (f"{seconds:.4g}" for seconds in (*time, sum(time)))
        rows.append((*how, *bytes_, *parts, f"{flops / sum(time) / peak:.1%}"))
    columns = ("model", "mode", "rows", "accumulation", "remat", "peak GiB", "sent GB")
    columns += ("matrices", "memory", "links", "step s", "MFU at most")
    title = f"what fits on {target}, by an ESTIMATE of a step's seconds: {FORMULA}"
    return table(title, columns, rows)
