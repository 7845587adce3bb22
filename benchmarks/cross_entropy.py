"""Time and memory of head and cross-entropy with both gradients: ours, plain autodiff, optax.

    python benchmarks/cross_entropy.py                      # 32,768 rows, width 2048, 100,352 ids
    python benchmarks/cross_entropy.py --rows 512 --width 128 --vocab 8192 --dtype float32
    python benchmarks/cross_entropy.py --aot h100:1x1       # peak bytes by that target's compiler

All compute the same: the contestants' losses and gradients are compared before timing. They take
turns, one call each, and the median is printed. Peak bytes are the compiler's, arguments and
results included; with --aot nothing runs. tokamax takes part where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

from stablelm_jax.kernels.cross_entropy import IMPLEMENTATIONS, cross_entropy
from stablelm_jax.planning.targets import parse_target

# (x_RD, kernel_DV, targets_R, weights_R) -> loss
Loss = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32_768)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=100_352)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--calls", type=int, default=10, help="timed calls of each")
    parser.add_argument("--aot", metavar="TARGET", help="compile for that machine, time nothing")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="leave the others out")
    arguments = parser.parse_args()
    if arguments.aot:
        jax.config.update("jax_platforms", "cpu")  # nothing runs; the compilers need no device
    losses = _contestants()
    if arguments.only:
        losses = {name: losses[name] for name in arguments.only}
    programs, peaks = {}, {}
    for name, loss in losses.items():
        programs[name], peaks[name] = _compile(loss, arguments)
    times = {} if arguments.aot else _race(programs, arguments)
    Console().print(_table(arguments, peaks, times))


def _contestants() -> dict[str, Loss]:
    def ours(name: str) -> Loss:
        return lambda *arrays: cross_entropy(*arrays, implementation=name)[0]

    losses = {name: ours(name) for name in IMPLEMENTATIONS}
    losses["optax"] = _optax
    if importlib.util.find_spec("tokamax"):
        losses["tokamax"] = _tokamax
    return losses


def _optax(x_RD, kernel_DV, targets_R, weights_R):
    logits_RV = jnp.matmul(x_RD, kernel_DV, preferred_element_type=jnp.float32)
    nll_R = optax.softmax_cross_entropy_with_integer_labels(logits_RV, targets_R)
    return jnp.sum(weights_R * nll_R)


def _tokamax(x_RD, kernel_DV, targets_R, weights_R):
    """Its losses are summed or averaged, never weighted: good for equal weights alone."""
    import tokamax

    total = tokamax.linear_softmax_cross_entropy_loss(x_RD, targets_R, kernel_DV, reduction="sum")
    return total * weights_R[0]


def _compile(loss: Loss, arguments):
    """The program of the loss and its two gradients, and its peak in bytes or why there is none."""
    rows, width, vocab = arguments.rows, arguments.width, arguments.vocab
    dtype = jnp.dtype(arguments.dtype)
    place = None
    if arguments.aot:
        device = parse_target(arguments.aot).devices()[0]
        place = jax.sharding.SingleDeviceSharding(device)
    shapes = (
        jax.ShapeDtypeStruct((rows, width), dtype, sharding=place),
        jax.ShapeDtypeStruct((width, vocab), dtype, sharding=place),
        jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=place),
        jax.ShapeDtypeStruct((rows,), jnp.float32, sharding=place),
    )
    try:
        program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
    except jax.errors.JaxRuntimeError as error:  # a TPU's compiler refuses what does not fit
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, "does not fit"
    memory = program.memory_analysis()
    if arguments.aot or jax.default_backend() != "cpu":
        return program, memory.peak_memory_in_bytes
    # the compiler of CPUs leaves what is temporary out of its peak
    parts = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
    return program, sum(parts)


def _race(programs, arguments) -> dict[str, list[float]]:
    """{name: seconds of each call}, after one call that is compared with the first one's."""
    programs = {name: program for name, program in programs.items() if program}
    inputs = _inputs(arguments)
    expected = None
    for name, program in programs.items():
        found = jax.block_until_ready(program(*inputs))
        expected = expected or found
        _compare(name, found, expected, arguments.dtype)
    times = {name: [] for name in programs}
    for _ in range(arguments.calls):
        for name, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(*inputs))
            times[name].append(time.perf_counter() - began)
    return times


def _inputs(arguments):
    """Logits of standard deviation 1, every token of the same weight."""
    keys = jax.random.split(jax.random.key(0), 3)
    x_RD = jax.random.normal(keys[0], (arguments.rows, arguments.width), arguments.dtype)
    kernel_DV = jax.random.normal(keys[1], (arguments.width, arguments.vocab), arguments.dtype)
    targets_R = jax.random.randint(keys[2], (arguments.rows,), 0, arguments.vocab)
    weights_R = jnp.full(arguments.rows, 1 / arguments.rows, jnp.float32)
    return x_RD, kernel_DV / arguments.width**0.5, targets_R, weights_R


def _compare(name, found, expected, dtype) -> None:
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        error = jnp.linalg.norm((f - e).astype(jnp.float32)) / jnp.linalg.norm(e)
        if not error < tolerance:
            raise SystemExit(f"{name} computes something else: relative difference {error:.2g}")


def _table(arguments, peaks, times) -> Table:
    where = arguments.aot or jax.devices()[0].device_kind
    shape = f"{arguments.rows:,} x {arguments.width:,} x {arguments.vocab:,} {arguments.dtype}"
    table = Table(title=f"head and cross-entropy with gradients, {shape}, {where}")
    for column in ("who", "ms (median)", "min", "TFLOP/s", "peak GiB"):
        table.add_column(column, justify="right")
    work = 6 * arguments.rows * arguments.width * arguments.vocab  # three products
    for name, peak in peaks.items():
        speed = ["", "", ""]
        if seconds := times.get(name):
            median = statistics.median(seconds)
            speed = [f"{1e3 * median:,.1f}", f"{1e3 * min(seconds):,.1f}"]
            speed.append(f"{work / median / 1e12:,.3g}")
        size = peak if isinstance(peak, str) else f"{peak / 2**30:,.3f}"
        table.add_row(name, *speed, size)
    return table


if __name__ == "__main__":
    main()
