"""Attention, forward and backward: milliseconds and TFLOP/s of the implementations, side by side.

    python benchmarks/attention.py                        # Stable LM 2 1.6B, four rows
    python benchmarks/attention.py --heads 32 --kv-heads 8 --head-size 160
    python benchmarks/attention.py --tune                 # best tiles of pallas_gpu, for BLOCKS
    python benchmarks/attention.py --smoke                # on a CPU, kernels interpreted
    python benchmarks/attention.py --aot                  # what the compiler says; needs no GPU

All work on the same random inputs, in one run, causal: with one document a row, then with documents
of the mean lengths of --documents. Before the clock starts, output and gradients are held against
`chunked` in float32 ("error": the largest relative distance of the four arrays). Who knows no
documents takes part in the first round alone. Times are the least of --repeats calls.

Beside ours, other people's kernels take part where they are installed and the chip is theirs
(Hopper or newer): cuDNN's and tokamax's by their public functions, which know no documents, and
both again by names that their packages keep private, because only there documents can be told
without a T x T mask. No config can choose them for training.

TFLOP/s count the causal triangle, documents or not: 2 H a head and pair of T * T forward, 5 H
backward (arXiv 2307.08691, section 4.1, halved). So with documents they may pass the chip's peak.
"area" is the unmasked part of the triangle, "of whole" the time of forward and backward against
that of whole rows: ideal is that the two are equal.

B rows, T tokens of a row, N query heads, K key/value heads, H head size, M most documents of a row.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from inputs import typical_segments
from rich.console import Console
from rich.table import Table

from stablelm_jax.kernels import attention, attention_gpu, attention_splash, attention_tpu
from stablelm_jax.kernels.attention_gpu import Blocks, Tile
from stablelm_jax.kernels.device import traced_device
from stablelm_jax.kernels.documents import document_spans

Attention = Callable[..., jax.Array]

SMOKE = dict(rows=1, length=256, heads=2, kv_heads=1, head_size=16, repeats=3, documents=[None, 64])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rows", 4), ("length", 4096), ("heads", 32), ("kv-heads", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument(
        "--documents",
        type=lambda text: None if text == "whole" else float(text),
        nargs="+",
        default=[None, 1024.0, 512.0],
        metavar="MEAN",
        help="mean lengths of documents, one round each; 'whole': one document a row",
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--implementations", nargs="+", metavar="NAME", help="leave the others out")
    parser.add_argument("--tune", action="store_true", help="time tiles of pallas_gpu instead")
    parser.add_argument("--smoke", action="store_true", help="tiny, kernels interpreted")
    targets = ["h100:1x1", "a100-40gb:1x1"]
    parser.add_argument(
        "--aot",
        nargs="*",
        metavar="TARGET",
        help=f"attention kernels' instructions on {targets}, or others",
    )
    arguments = parser.parse_args()
    if arguments.aot is not None:
        jax.config.update("jax_platforms", "cpu")  # nothing runs; the compilers need no device
        import attention_bound

        attention_bound.show(Console(width=175), arguments.aot or targets, [arguments.head_size])
        return
    if arguments.smoke:
        vars(arguments).update(SMOKE)
    console = Console(width=140)
    console.print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {vars(arguments)}")
    if arguments.tune:
        import attention_tune

        for mean in arguments.documents:
            console.print(f"documents: {mean or 'whole rows'}")
            inputs = make_inputs(arguments, mean)
            seconds_of = partial(least, arguments.repeats)
            console.print(attention_tune.tune(console, inputs, seconds_of, arguments.smoke))
    else:
        table, failed = compare(console, arguments)
        console.print(table)
        named = {*(arguments.implementations or ()), "auto"}
        if wrong := [name for name in failed if named & set(name.strip(")").split(" ("))]:
            raise SystemExit(f"cannot run here: {', '.join(wrong)}")


def make_inputs(arguments: argparse.Namespace, mean: float | None) -> tuple[jax.Array, ...]:
    """q, k, v, the gradient of the output, segment ids."""
    rows, length, size = arguments.rows, arguments.length, arguments.head_size
    rng = np.random.default_rng(0)
    heads = (arguments.heads, arguments.kv_heads, arguments.kv_heads, arguments.heads)
    shapes = [(rows, length, n, size) for n in heads]
    arrays = [jnp.asarray(rng.normal(size=shape), arguments.dtype) for shape in shapes]
    return *arrays, jnp.asarray(typical_segments(rows, length, mean))


def contestants(arguments: argparse.Namespace, inputs) -> dict[str, tuple[Attention, bool]]:
    """By name: how to call it on `inputs`, and whether it keeps documents apart."""
    found = {name: (function, True) for name, function in attention.IMPLEMENTATIONS.items()}
    if arguments.smoke:
        blocks = Blocks(*3 * [Tile(32, 32, 4, 2)])
        found["pallas_gpu"] = (
            partial(attention_gpu.pallas_gpu, blocks=blocks, interpret=True),
            True,
        )
        found["pallas_tpu"] = (partial(attention_tpu.pallas_tpu, interpret=True), True)
        found["splash"] = (partial(attention_splash.splash, interpret=True), True)
    found["jax's cudnn"] = (jax_cudnn, False)
    most_documents = int(inputs[4].max())  # segment ids count from 1 in each row
    found["cudnn, documents"] = (partial(cudnn, most_documents=most_documents), True)
    found["jax's triton"] = (jax_triton, True)
    if importlib.util.find_spec("tokamax"):
        found["tokamax, documents"] = (tokamax, True)
        for name in ("mosaic", "triton"):
            found[f"tokamax's {name}"] = (partial(tokamax_public, name), False)
    if not arguments.implementations:
        del found["pallas_mosaic"]  # it never ran on a chip and might hang there: by name alone
    chosen, _ = attention.choose(traced_device(), *inputs[:2])
    found = {(f"{n} (auto)" if n == chosen else n): v for n, v in found.items()}
    if arguments.implementations:
        wanted = set(arguments.implementations)
        found = {n: v for n, v in found.items() if wanted & {n, n.removesuffix(" (auto)")}}
    return found


def jax_cudnn(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation="cudnn"
    )


def cudnn(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, *, most_documents: int):
    """cuDNN's fused attention with documents packed in rows.

    For its backward pass it keeps B M N T float32, M the most documents of a row.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    lengths_BM, offsets_BM = packed_documents(segment_ids_BT, most_documents)
    # jax 0.10 counts the offsets of keys in heads of queries: with fewer of them it is wrong.
    group = q_BTNH.shape[2] // k_BTKH.shape[2]
    k_BTKH, v_BTKH = (jnp.repeat(x, group, axis=2) for x in (k_BTKH, v_BTKH))
    return dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        q_seqlen=lengths_BM,
        kv_seqlen=lengths_BM,
        q_offsets=offsets_BM,
        kv_offsets=offsets_BM,
        scale=q_BTNH.shape[-1] ** -0.5,
        mask_type=MaskType.PADDING_CAUSAL,
    )


def packed_documents(segment_ids_BT, most: int) -> tuple[jax.Array, jax.Array]:
    """Lengths [B, M] and first tokens [B, M + 1] of each row's documents; -1 where is none."""
    start_BT, end_BT = document_spans(segment_ids_BT)
    is_first_BT = start_BT == jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    # Every other token's numbers are written past the end, where they are dropped.
    place_BT = jnp.where(is_first_BT, jnp.cumsum(is_first_BT, axis=1) - 1, most + 1)
    rows_B1 = jnp.arange(segment_ids_BT.shape[0])[:, None]
    empty = jnp.full((segment_ids_BT.shape[0], most + 1), -1, jnp.int32)
    offsets = empty.at[rows_B1, place_BT].set(start_BT, mode="drop")
    lengths = empty.at[rows_B1, place_BT].set(end_BT - start_BT, mode="drop")[:, :most]
    return lengths, offsets


def tokamax(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    """tokamax's Mosaic kernels, which skip the keys before a document's start."""
    from tokamax._src.ops.attention import api, base

    start_BT, _ = document_spans(segment_ids_BT)
    mask = base.Mask(k_start=start_BT[:, None, :], is_causal=True)
    return api.IMPLEMENTATIONS["mosaic_gpu"](q_BTNH, k_BTKH, v_BTKH, mask=mask)


def jax_triton(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    from jax.experimental.pallas.ops.gpu.attention import mha

    if q_BTNH.shape[2] != k_BTKH.shape[2]:
        raise NotImplementedError("no grouped queries")
    scale = q_BTNH.shape[3] ** -0.5
    return mha(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, sm_scale=scale, causal=True)


def tokamax_public(name, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    import tokamax

    return tokamax.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation=name
    )


def compare(console: Console, arguments: argparse.Namespace) -> tuple[Table, list[str]]:
    """A row for each implementation and round, and who cannot run here, which a line explains."""
    table = Table("documents", "area", "implementation", "error")
    for column in ("forward ms", "TFLOP/s", "backward ms", "TFLOP/s", "both ms", "of whole"):
        table.add_column(column, justify="right")
    whole: dict[str, float] = {}
    failed: list[str] = []
    for mean in arguments.documents:
        inputs = make_inputs(arguments, mean)
        area = unmasked_area(inputs[4])
        in_float32 = [x.astype(jnp.float32) for x in inputs[:4]]
        with jax.default_matmul_precision("highest"):  # on a GPU float32 would be TF32
            expected = jax.jit(partial(gradients, attention.chunked))(*in_float32, inputs[4])
        flops = arguments.rows * arguments.heads * arguments.head_size * arguments.length**2
        first = ["whole rows" if mean is None else f"mean {mean:g}", f"{area:.3f}"]
        for name, (implementation, keeps_documents) in contestants(arguments, inputs).items():
            if mean is not None and not keeps_documents:
                continue
            try:
                program = jax.jit(partial(gradients, implementation))
                found = program(*inputs)
                forward = least(
                    arguments.repeats, jax.jit(implementation), (*inputs[:3], inputs[4])
                )
                both = least(arguments.repeats, program, inputs)
            except Exception as error:  # of any library: the others are to be seen
                reason = (str(error).splitlines() or [""])[0]
                console.print(f"{name} cannot run: {type(error).__name__}: {reason}", style="dim")
                failed.append(name)
                continue
            if mean is None:
                whole[name] = both
            row = [
                *first,
                name,
                f"{np.max([relative_distance(*pair) for pair in zip(found, expected)]):.1e}",
            ]
            for seconds, count in ((forward, 2 * flops), (both - forward, 5 * flops)):
                row += [f"{1e3 * seconds:.3f}", f"{count / seconds / 1e12:.3g}"]
            row += [f"{1e3 * both:.3f}", f"{both / whole[name]:.3f}" if name in whole else ""]
            table.add_row(*row)
            console.print("  ".join(row), style="dim")  # a long run shows that it runs
        table.add_section()
    return table, failed


def gradients(implementation, q, k, v, do, segment_ids):
    """Output and gradients of q, k, v."""
    out, backward = jax.vjp(lambda *qkv: implementation(*qkv, segment_ids), q, k, v)
    return out, *backward(do)


def least(repeats: int, function: Callable[..., Any], inputs) -> float:
    """Seconds of the fastest call; ten are queued at a time, so that starting costs nothing."""
    jax.block_until_ready(function(*inputs))  # compiles
    queued = 10 if repeats >= 10 else 1
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(queued):
            out = function(*inputs)
        jax.block_until_ready(out)
        seconds.append((time.perf_counter() - started) / queued)
    return min(seconds)


def unmasked_area(segment_ids_BT) -> float:
    """Pairs of query and key that the mask lets see each other, of those of the causal triangle."""
    start_BT, _ = document_spans(segment_ids_BT)
    rows, length = start_BT.shape
    seen_BT = 1 + np.arange(length) - np.asarray(start_BT)
    return float(seen_BT.sum() / (rows * length * (length + 1) / 2))


def relative_distance(found, expected) -> float:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


if __name__ == "__main__":
    main()
