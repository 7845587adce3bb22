"""Attention, forward and backward: milliseconds and TFLOP/s of the implementations, side by side.

    python benchmarks/attention.py                        # Stable LM 2 1.6B, four rows
    python benchmarks/attention.py --heads 32 --kv-heads 8 --head-size 160 --documents 8
    python benchmarks/attention.py --tune                 # best tiles of pallas_gpu, for BLOCKS

All work on the same random bfloat16 inputs, in one run; before the clock starts their outputs and
gradients are held against `chunked` in float32 ("error": of all four arrays the largest relative
distance). Times are the least of --repeats calls. FLOPs count the pairs that the mask allows:
4 H a pair and head forward, 10 H backward (arXiv 2307.08691, section 4.1).

B rows, T tokens of a row, N query heads, K key/value heads, H head size.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from stablelm_jax.kernels import attention, attention_gpu
from stablelm_jax.kernels.attention_gpu import Blocks, Tile

# (queries, keys, warps, stages) to try; of key gradients the first two are exchanged.
CANDIDATES = [
    Tile(queries, keys, warps, stages)
    for queries, keys in ((64, 32), (64, 64), (128, 32), (128, 64), (128, 128))
    for warps in (4, 8)
    for stages in (2, 3)
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rows", 4), ("length", 4096), ("heads", 32), ("kv-heads", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--documents", type=int, default=1, help="of equal length, in each row")
    parser.add_argument("--repeats", type=int, default=20)
    names = [*attention.IMPLEMENTATIONS, "cudnn"]
    parser.add_argument(
        "--implementations", nargs="+", choices=names, default=["chunked", "pallas_gpu", "cudnn"]
    )
    parser.add_argument("--tune", action="store_true", help="time tiles of pallas_gpu instead")
    arguments = parser.parse_args()
    console, inputs = Console(), make_inputs(arguments)
    console.print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {vars(arguments)}")
    if arguments.tune:
        console.print(tune(console, inputs, arguments.repeats))
    else:
        console.print(compare(inputs, arguments))


def make_inputs(arguments: argparse.Namespace) -> tuple[jax.Array, ...]:
    """q, k, v, the gradient of the output, segment ids."""
    rows, length, size = arguments.rows, arguments.length, arguments.head_size
    rng = np.random.default_rng(0)
    heads = (arguments.heads, arguments.kv_heads, arguments.kv_heads, arguments.heads)
    arrays = [jnp.bfloat16(rng.normal(size=(rows, length, n, size))) for n in heads]
    documents = 1 + np.arange(length) * arguments.documents // length
    return *arrays, jnp.tile(jnp.int32(documents), (rows, 1))


def compare(inputs, arguments: argparse.Namespace) -> Table:
    """One line for each implementation; one that cannot run here says why."""
    table = Table("implementation", "error", "forward ms", "TFLOP/s", "backward ms", "TFLOP/s")
    in_float32 = [x.astype(jnp.float32) for x in inputs[:4]]
    expected = jax.jit(partial(gradients, attention.chunked))(*in_float32, inputs[4])
    pair_flops = arguments.heads * arguments.head_size * count_pairs(inputs[4])
    for name in arguments.implementations:
        implementation = implementation_of(name)
        try:
            found = jax.jit(partial(gradients, implementation))(*inputs)
            forward, both = times(implementation, inputs, arguments.repeats)
        except (ValueError, NotImplementedError, RuntimeError) as error:  # of XLA: RuntimeError
            table.add_row(name, f"cannot run: {str(error).splitlines()[0][:120]}")
            continue
        row = [name, f"{max(map(relative_distance, found, expected)):.1e}"]
        for seconds, flops in ((forward, 4 * pair_flops), (both - forward, 10 * pair_flops)):
            row += [f"{1e3 * seconds:.3f}", f"{flops / seconds / 1e12:.3g}"]
        table.add_row(*row)
    return table


def tune(console: Console, inputs, repeats: int) -> Blocks:
    """The fastest of CANDIDATES for each kernel, one kernel after the other."""
    best = attention_gpu.blocks_for(inputs[0].shape[3])
    for field, backward in (("forward", False), ("keys", True), ("queries", True)):
        seconds = {}
        for tile in dict.fromkeys([getattr(best, field), *candidates(field)]):
            blocks = dataclasses.replace(best, **{field: tile})
            run = partial(attention_gpu.pallas_gpu, blocks=blocks)
            try:
                seconds[tile] = times(run, inputs, repeats)[backward]
                console.print(f"{field:8} {tile} {1e3 * seconds[tile]:.3f} ms")
            except RuntimeError as error:  # more shared memory than the chip has
                console.print(f"{field:8} {tile} {str(error).splitlines()[0][:80]}")
        best = dataclasses.replace(best, **{field: min(seconds, key=seconds.get)})
    return best


def candidates(field: str) -> Iterable[Tile]:
    if field != "keys":
        return CANDIDATES
    return [dataclasses.replace(t, queries=t.keys, keys=t.queries) for t in CANDIDATES]


def implementation_of(name: str) -> Callable[..., jax.Array]:
    return cudnn if name == "cudnn" else attention.IMPLEMENTATIONS[name]


def cudnn(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    """jax's own call of cuDNN, causal alone: it is comparable for one document a row."""
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation="cudnn"
    )


def gradients(implementation, q, k, v, do, segment_ids):
    """Output and gradients of q, k, v."""
    out, backward = jax.vjp(lambda *qkv: implementation(*qkv, segment_ids), q, k, v)
    return out, *backward(do)


def times(implementation, inputs, repeats: int) -> tuple[float, float]:
    """Seconds of the forward pass, and of forward and backward."""
    q, k, v, _, segment_ids = inputs
    forward = least(jax.jit(implementation), (q, k, v, segment_ids), repeats)
    return forward, least(jax.jit(partial(gradients, implementation)), inputs, repeats)


def least(function: Callable[..., Any], inputs, repeats: int) -> float:
    jax.block_until_ready(function(*inputs))  # compiles
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function(*inputs))
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def count_pairs(segment_ids_BT) -> int:
    """Queries with each key that they may see."""
    start_BT, _ = attention_gpu.document_spans(segment_ids_BT)
    seen_BT = 1 + np.arange(start_BT.shape[1]) - np.asarray(start_BT)
    return int(seen_BT.sum())


def relative_distance(found, expected) -> float:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


if __name__ == "__main__":
    main()
