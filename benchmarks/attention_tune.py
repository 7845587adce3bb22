"""The fastest tiles of our attention kernels on this GPU: `benchmarks/attention.py --tune`.

Each kernel is compiled and timed alone. Of the tiles that might be fast those are tried that
NVIDIA's compiler makes without spilling registers for heads of 64 or of 160, on A100 or Hopper.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from stablelm_jax.kernels import attention_gpu
from stablelm_jax.kernels.attention_gpu import Blocks, Tile
from stablelm_jax.kernels.documents import document_spans

# Rows of a program's own block, rows of those that it visits, warps; queries are the first in the
# forward kernel and the query gradient, keys in the key gradients.
SHAPES = ((64, 64, 4), (128, 32, 4), (128, 64, 4), (64, 128, 4), (128, 64, 8), (128, 128, 8))

# Relative; other tiles round in another order.
LIMIT = 1e-2


def candidates(field: str, best: Tile) -> Iterable[Tile]:
    """The table's own first, then each of SHAPES; four stages where tiles are small."""
    yield best
    for own, visited, warps in SHAPES:
        for stages in (2, 3, 4) if own * visited <= 64 * 64 else (2, 3):
            queries, keys = (visited, own) if field == "keys" else (own, visited)
            tile = Tile(queries, keys, warps, stages, best.one_loop)
            if tile != best:
                yield tile


def tune(console: Console, inputs, seconds_of: Callable[..., float], interpret=False) -> Blocks:
    """The fastest candidate for each kernel, printed as they come.

    One whose results are not those of the table's tile, up to bfloat16's rounding, is not taken.

    inputs: as of `attention.make_inputs`, of a length that all tiles divide.
    seconds_of(program, its inputs): of its fastest call.
    """
    best = attention_gpu.blocks_for(inputs[0].shape[3], inputs[0].dtype)
    for field, program, arguments in kernels(inputs, best, interpret):
        seconds: dict[Tile, float] = {}
        expected = None
        for tile in candidates(field, getattr(best, field)):
            run = jax.jit(partial(program, tile=tile, interpret=interpret))
            try:
                found = run(*arguments)
                expected = found if expected is None else expected
                error = np.max(jax.tree.leaves(jax.tree.map(_relative_distance, found, expected)))
                took = seconds_of(run, arguments)
                console.print(f"{field:8} {tile} {1e3 * took:.3f} ms, other by {error:.0e}")
            except RuntimeError as error:  # more shared memory than the chip has
                console.print(f"{field:8} {tile} {str(error).splitlines()[0][:80]}")
                continue
            if error < LIMIT:  # false where it is no number
                seconds[tile] = took
            else:
                console.print(f"{field:8} {tile} is wrong", style="bold red")
        best = dataclasses.replace(best, **{field: min(seconds, key=seconds.get)})
    return best


def _relative_distance(found, expected) -> float:
    found, expected = (x.astype(jnp.float32) for x in (found, expected))
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def kernels(inputs, blocks: Blocks, interpret: bool) -> list[tuple[str, Callable[..., Any], tuple]]:
    """Of each kernel its field in Blocks, a function of arrays and a tile, and those arrays."""
    q_BTNH, k_BTKH, v_BTKH, do_BTNH, segment_ids_BT = inputs
    start_BT, end_BT = document_spans(segment_ids_BT)
    saved = (start_BT, q_BTNH, k_BTKH, v_BTKH)
    o_BTNH, logsumexp_BNT = attention_gpu._output(saved, blocks.forward, interpret)
    delta_BNT = attention_gpu._sum_of_heads(do_BTNH * o_BTNH)
    saved_more = (*saved, do_BTNH, logsumexp_BNT, delta_BNT)
    return [
        ("forward", attention_gpu._output, (saved,)),
        ("keys", attention_gpu._key_gradients, (saved_more, end_BT)),
        ("queries", attention_gpu._query_gradient, (saved_more,)),
    ]
