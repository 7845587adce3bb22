"""`plan --sweep`: compiles the promising ways to divide a step, says each, ranks what fits."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from stablelm_jax import config as config_lib
from stablelm_jax.model.flops import train_flops_per_token
from stablelm_jax.planning.compile import DoesNotFit, compile_for
from stablelm_jax.planning.estimate import FORMULA
from stablelm_jax.planning.layout import Layout
from stablelm_jax.planning.search import Candidate, Compile, Outcome, candidates, search
from stablelm_jax.planning.targets import Target

INTERRUPTED = 130  # exit code, as shells give it for Ctrl-C
_GIB = 2**30


def sweep(config: ConfigDict, target: Target, compile_one: Compile = compile_for) -> int:
    """Prints each result as it comes and the ranking of what fits, also after Ctrl-C.

    Returns 0, or 130 after Ctrl-C.

    Raises:
      ConfigError: the batch does not divide over the devices.
      CompilerError: the target's compiler is not installed.
      DoesNotFit: nothing fits.
    """
    console = Console(width=None if sys.stdout.isatty() else 140)
    ordered = candidates(config, target)
    hopeless = sum(c.needed > target.available_bytes for c in ordered)
    console.print(
        f"{len(ordered)} ways to divide a step on {target}; {hopeless} need more than its "
        f"{target.available_bytes / _GIB:.1f} GiB by their shapes alone. Ctrl-C ranks what is done."
    )
    outcomes: list[Outcome] = []
    heard = functools.partial(_in_background, compile_one)
    try:
        with console.status("compiling, the most promising first"):
            for outcome in search(config, target, ordered, heard):
                outcomes.append(outcome)
                console.print(_line(len(outcomes), outcome), soft_wrap=True, highlight=False)
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    return _conclude(console, config, target, ordered, outcomes, interrupted)


def _conclude(
    console: Console,
    config: ConfigDict,
    target: Target,
    ordered: Sequence[Candidate],
    outcomes: Sequence[Outcome],
    interrupted: bool,
) -> int:
    ranked = sorted((o for o in outcomes if o.time), key=lambda o: o.time.total)
    if not ranked and not interrupted:
        raise DoesNotFit(_nothing_fits(target, ordered, outcomes))
    if ranked:
        console.print(_ranking(config, target, ranked))
        console.print("the best by this estimate:")
        console.print(overrides(config, ranked[0].candidate), soft_wrap=True, highlight=False)
    if interrupted:
        print(
            f"interrupted: {len(outcomes)} compiled, the ranking is of those that fit among them",
            file=sys.stderr,
        )
    return INTERRUPTED if interrupted else 0


def overrides(config: ConfigDict, candidate: Candidate) -> str:
    """The flags that make `config` divide its step like `candidate`."""
    settings = candidate.settings
    if config.parallel.data == settings["parallel.data"]:
        del settings["parallel.data"]
    return " ".join(f"--config.{key}={value}" for key, value in settings.items())


def _nothing_fits(target: Target, ordered: Sequence[Candidate], outcomes: Sequence[Outcome]) -> str:
    least = min(candidate.needed for candidate in ordered)
    last = f"; the last that was compiled: {outcomes[-1].problem}" if outcomes else ""
    return (
        f"{target}: nothing fits: of {len(ordered)} ways to divide the step, the smallest needs at "
        f"least {least / _GIB:.1f} of {target.available_bytes / _GIB:.1f} GiB by its shapes alone; "
        f"use more devices, a chip with more memory or a shorter data.sequence_length{last}"
    )


def _line(number: int, outcome: Outcome) -> str:
    layout, step = outcome.candidate.layout, outcome.step
    text = (
        f"{number:3}  model {layout.model}  {_mode(layout):6}  remat {layout.remat:4}  "
        f"{layout.rows:3} rows x {layout.accumulation:<4}"
    )
    if step is None:
        return f"{text}  {outcome.problem.split('; use more')[0]}"
    return (
        f"{text}  {step.peak_bytes / _GIB:6.1f} of {step.available_bytes / _GIB:.1f} GiB  "
        f"{outcome.time.total:8.4g} s estimated  (compiled in {step.seconds:.0f} s)"
    )


def _mode(layout: Layout) -> str:
    return "FSDP" if layout.fsdp else "ZeRO-1" if layout.zero1 else "whole"


def _ranking(config: ConfigDict, target: Target, ranked: Sequence[Outcome]) -> Table:
    title = f"what fits on {target}, by an ESTIMATE of a step's seconds: {FORMULA}"
    table = Table(title=title, title_justify="left")
    columns = ("model", "mode", "rows", "accumulation", "remat", "peak GiB", "sent GB")
    parts = ("matrices", "memory", "links", "step s", "MFU at most")
    for column in columns + parts:
        table.add_column(column, justify="right")
    for outcome in ranked:
        table.add_row(*_row(config, target, outcome))
    return table


def _row(config: ConfigDict, target: Target, outcome: Outcome) -> tuple[str, ...]:
    layout, time = outcome.candidate.layout, outcome.time
    flops = train_flops_per_token(layout.sizes, layout.sequence_length, causal=False)
    peak = target.num_devices * target.facts["peak_tflops"] * 1e12
    mfu = config_lib.tokens_per_step(config) * flops / time.total / peak
    return (
        str(layout.model),
        _mode(layout),
        str(layout.rows),
        str(layout.accumulation),
        layout.remat,
        f"{outcome.step.peak_bytes / _GIB:.1f}",
        f"{sum(found.sent for found in outcome.step.collectives) / 1e9:.2f}",
        f"{time.matrices:.4g}",
        f"{time.memory:.4g}",
        f"{time.communication:.4g}",
        f"{time.total:.4g}",
        f"{mfu:.1%}",
    )


def _in_background(function: Callable, *arguments: Any) -> Any:
    """function(*arguments) in a thread: a compiler at work in this one would not hear Ctrl-C."""
    done: dict[str, Any] = {}

    def work():
        try:
            done["result"] = function(*arguments)
        except BaseException as error:  # raised below, where somebody waits for it
            done["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.2)
    if "error" in done:
        raise done["error"]
    return done["result"]
