"""The programs of a run, compiled before its loop: there a signal must not meet a compilation."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

from stablelm_jax.kernels.check import WrongKernel
from stablelm_jax.parallel import distributed
from stablelm_jax.run.compilation_cache import CompilationCache
from stablelm_jax.training.held_out import EvalStep
from stablelm_jax.training.setup import Run
from stablelm_jax.training.step import StepFunction


@dataclasses.dataclass(frozen=True)
class Programs:
    """What the loop calls.

    Attributes:
      step: of training.
      eval_step: of held-out text; None where the run does not evaluate.
      samples: f(params) -> {prompt: continuation}; None where the run takes none.
    """

    step: StepFunction
    eval_step: EvalStep | None
    samples: Callable[[Any], dict[str, str]] | None


def compile_programs(run: Run, console: Console, cache: CompilationCache) -> Programs:
    """Tries the attention out, compiles what the config asks for, and says how long that took.

    Raises:
      WrongKernel: attention is wrong here or on another host.
    """
    console.print(_checked_attention(run), markup=False, soft_wrap=True)
    began = time.monotonic()
    with console.status("compiling the train step"):
        step = run.compile_step()
    seconds = time.monotonic() - began
    console.print(f"the train step was ready after {seconds:.1f} s; {cache}")
    return Programs(
        step=step,
        eval_step=run.compile_eval() if run.config.evaluation.every else None,
        samples=run.prepare_samples() if run.config.samples.every else None,
    )


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
