"""Compiling a run's train step for a target that is not here, and what the compiler says of it."""

from __future__ import annotations

import dataclasses
import re
import time

from ml_collections import ConfigDict

from stablelm_jax import config as config_lib
from stablelm_jax.parallel.mesh import make_mesh
from stablelm_jax.parallel.sharding import batch_parts
from stablelm_jax.planning.program import Collective, collectives
from stablelm_jax.planning.targets import Target
from stablelm_jax.training.programs import attention_for, lower_step, pairs_of_a_row


class DoesNotFit(ValueError):
    """The step needs more memory than a device of the target has."""


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What a compiler says of one training step on one device."""

    target: Target
    mesh: dict[str, int]  # size of each axis
    rows: int  # of a device in one microbatch
    attention: str  # name of the implementation
    seconds: float  # to trace and compile
    argument_bytes: int  # weights, moments and batch; the results take over their memory
    temporary_bytes: int  # room reserved for everything else, with the gaps between buffers
    peak_bytes: int  # in use at one moment; on TPUs less than what is reserved in all
    collectives: list[Collective]
    pairs: int | None = None  # of a row, at most; None where there are none
    text: str = dataclasses.field(default="", repr=False)  # the compiled program


def compile_for(config: ConfigDict, target: Target) -> CompiledStep:
    """Compiles the train step of `config`, of its largest batch, with the target's own compiler.

    Raises:
      ConfigError: the config does not fit the number of devices.
      CompilerError: the compiler is not installed.
      DoesNotFit: it compiles, but not into the memory of a device.
    """
    devices = target.devices()
    sizes = config_lib.validate_mesh(config, len(devices))
    config = config_lib.largest_step(config)
    mesh = make_mesh(**sizes, devices=devices)
    started = time.monotonic()
    lowered = lower_step(config, mesh, len(config_lib.mixture_weights(config)))
    try:
        compiled = lowered.compile()
    except Exception as error:  # jaxlib's XlaRuntimeError, which is a plain RuntimeError
        if used := re.search(r"\(?([\d.]+[KMGT])\)? exceeds available HBM", str(error)):
            raise DoesNotFit(_too_much(config, target, used[1] + "iB")) from error
        if "RESOURCE_EXHAUSTED" in str(error):
            raise DoesNotFit(f"{target}: {str(error).splitlines()[0][:300]}") from error
        raise
    memory, text = compiled.memory_analysis(), compiled.as_text()
    step = CompiledStep(
        target=target,
        mesh=sizes,
        rows=config.data.batch_size // batch_parts(mesh) // config.training.accumulation,
        attention=attention_for(config, devices[0])[0],
        seconds=time.monotonic() - started,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        collectives=collectives(text, sizes),
        pairs=pairs_of_a_row(config),
        text=text,
    )
    # The compiler of GPUs lets a program pass that cannot run.
    if step.peak_bytes > target.available_bytes:
        raise DoesNotFit(_too_much(config, target, f"{step.peak_bytes / 2**30:.1f} GiB"))
    return step


def _too_much(config: ConfigDict, target: Target, needed: str) -> str:
    training, parallel = config.training, config.parallel
    sizes = config_lib.validate_mesh(config, target.num_devices)
    rows = config.data.batch_size // (sizes["replica"] * sizes["data"]) // training.accumulation
    larger = next((n for n in range(2, rows + 1) if rows % n == 0), None)
    remedies = [
        larger
        and f"more microbatches (--config.training.accumulation={training.accumulation * larger})",
        training.remat != "full" and "more remat (--config.training.remat=full)",
        sizes["data"] > 1 and not parallel.fsdp and "--config.parallel.fsdp=True",
        f"a larger parallel.model than {sizes['model']}, or a target of more devices",
    ]
    return (
        f"{target}: a device needs {needed} and has {target.available_bytes / 2**30:.1f} GiB; try "
        f"{', '.join(filter(None, remedies))}"
    )
