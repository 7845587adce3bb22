"""Where the time of a training step goes at best: its kernels, by part of the model.

    CONFIG=configs/launch/stablelm_2_1_6b_h200_1x1.py
    python benchmarks/roofline.py --config $CONFIG
    python benchmarks/roofline.py --config $CONFIG \
        --also training.remat=attention --also training.remat=full,training.unroll=2

No GPU is needed. The step, one microbatch and one update, is compiled by the target's own compiler
(extra `aot`), and each kernel of the program is bound by what it must do: its matrix FLOPs at the
chip's peak or its bytes at the speed of memory, whichever takes longer; kernels do not overlap.
Several --microbatches add the sum of their gradients and what the loop over them costs.
--tflops and --gb_s give other rates than the data sheet's. Each --also compiles the step with
fields of the config changed and adds a line to a second table; --kernels N lists the N longest.

What it cannot see. Without a GPU the compiler tries nothing out: matrix products appear as the
kernels it would fall back to, not as cuBLAS's, and what it fuses with them may differ. A kernel's
own speed, caches and launches are not counted; attention is taken as causal, without documents, and
at the peak, which no attention kernel reaches. A kernel belongs to the part of the operation
that it ends with: a sum that is fused with a norm counts to the norm.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterable

import jax
from inputs import fields
from ml_collections import ConfigDict
from program_kernels import Kernel, kernels
from rich.console import Console
from rich.table import Table

from stablelm_jax import config as config_lib
from stablelm_jax.planning.compile import CompiledStep, DoesNotFit, compile_for
from stablelm_jax.planning.estimate import (
    Layout,
    divided,
    elementwise_bytes,
    layout_of,
    logit_bytes,
    update_bytes,
)
from stablelm_jax.planning.targets import Target, parse_target

# jax.named_scope in the model: (part of its matrix products, part of its other kernels).
SCOPES = {
    "attention_kernel": ("attention kernel", "attention kernel"),
    "attention": ("attention projections", "rotary, biases"),
    "rotary": ("rotary, biases", "rotary, biases"),
    "mlp": ("mlp projections", "SwiGLU"),
    "norm": ("norms, residual", "norms, residual"),
    "head": ("head, cross-entropy", "head, cross-entropy"),
    "embed": ("embedding", "embedding"),
}
LOOP = "layers' slices, stacks"
PARTS = [*dict.fromkeys(part for pair in SCOPES.values() for part in pair), LOOP, "optimizer"]

# Matrix products of T x T x head size in each of our kernels, of which the causal half is done.
ATTENTION_PRODUCTS = {
    "attention_forward": 2,
    "attention_query_gradient": 3,
    "attention_key_gradients": 4,
}


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the chip does in a second: FLOPs of matrix products, bytes of memory."""

    flops: float
    bytes: float

    def seconds(self, kernel: Kernel) -> float:
        """The time of all its runs in a step, at best."""
        once = max(kernel.flops / self.flops, (kernel.read + kernel.written) / self.bytes)
        return kernel.count * once


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # nothing runs; the compilers need no device
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--target", help="a GPU, as in h200:1x1; as config.parallel.target")
    parser.add_argument("--rows", type=int, help="of a microbatch; as the config's")
    parser.add_argument("--microbatches", type=int, default=1, help="of a step")
    parser.add_argument("--also", action="append", default=[], metavar="KEY=VALUE,...")
    parser.add_argument("--tflops", type=float, help="of matrix products; as the data sheet's")
    parser.add_argument("--gb_s", type=float, help="of memory; as the data sheet's")
    parser.add_argument("--kernels", type=int, default=0, metavar="N", help="list the N longest")
    arguments = parser.parse_args()
    config = config_lib.load(arguments.config)
    name = arguments.target or config.parallel.target
    if not name:
        parser.error("--target: is missing, and the config names none")
    target = parse_target(name)
    if target.facts["kind"] != "gpu":
        parser.error(f"--target {target}: only programs of GPUs are read")
    rates = Rates(
        1e12 * arguments.tflops if arguments.tflops else target.peak_flops,
        1e9 * (arguments.gb_s or target.facts["bandwidth_gb_s"]),
    )
    console = Console(width=130)
    step, found, layout = _compile(config, target, arguments, {})
    console.print(_by_part(step, found, layout, rates))
    if arguments.kernels:
        console.print(_longest(found, rates, arguments.kernels))
    if arguments.also:
        variants = _variants(config, target, arguments, console)
        console.print(_side_by_side({"as the config": (step, found)} | variants, rates))


def _variants(config: ConfigDict, target: Target, arguments, console: Console):
    """{text of --also: (step, kernels), or None where it does not fit}."""
    variants = {}
    for text in arguments.also:
        try:
            variants[text] = _compile(config, target, arguments, fields(text))[:2]
        except DoesNotFit as error:
            variants[text] = None
            console.print(f"{text}: {error}", markup=False)
    return variants


def _compile(
    config: ConfigDict, target: Target, arguments, changes: dict
) -> tuple[CompiledStep, list[Kernel], Layout]:
    """The step of a few microbatches in place of the config's many."""
    config = divided(config, changes)
    layout = layout_of(config, target.num_devices)
    rows = (arguments.rows or layout.rows) * layout.replica * layout.data
    short = {
        "data.batch_size": rows * arguments.microbatches,
        "training.accumulation": arguments.microbatches,
    }
    config = divided(config, short)
    layout = layout_of(config, target.num_devices)
    step = compile_for(config, target)
    found = [_with_attention(kernel, layout) for kernel in kernels(step.text)]
    return step, found, layout


def _with_attention(kernel: Kernel, layout: Layout) -> Kernel:
    """Our attention kernels' FLOPs, which the program does not say."""
    for name, products in ATTENTION_PRODUCTS.items():
        if kernel.op == "custom-call" and f"/{name}/" in kernel.path:
            width = layout.sizes.num_heads * layout.sizes.head_size / layout.model
            flops = products * layout.tokens * layout.sequence_length * width
            return dataclasses.replace(kernel, flops=round(flops))
    return kernel


def part_of(kernel: Kernel) -> tuple[str, str]:
    """(part of the model, 'forward' | 'backward' | '')."""
    scopes = [word for word in re.findall(r"\w+", kernel.path) if word in SCOPES]
    direction = "backward" if "transpose(" in kernel.path else "forward"
    if scopes:
        return SCOPES[scopes[-1]][0 if kernel.flops else 1], direction
    moved = re.search(r"(dynamic_slice|dynamic_update_slice)$", kernel.path)
    if moved or not kernel.read or (kernel.op == "copy" and not kernel.path):
        return LOOP, direction if kernel.path else ""
    if "jvp(" in kernel.path:
        return "norms, residual", direction
    return ("optimizer", "") if kernel.path.startswith("jit(train_step)/") else ("other", "")


def least(layout: Layout) -> dict[tuple[str, str], float]:
    """Bytes that a part must move, by the shapes: every product's operands and result once."""
    sizes, dtype = layout.sizes, layout.dtype_bytes
    a = layout.tokens * sizes.width * dtype
    f = layout.tokens * sizes.feed_forward_width * dtype / layout.model
    q, kv = (n * sizes.head_size for n in (sizes.num_heads, sizes.num_kv_heads))
    qo, kvs = (layout.tokens * n * dtype / layout.model for n in (q, kv))
    attention_weights = dtype * sizes.width * (2 * q + 2 * kv) / layout.model
    mlp_weights = 3 * dtype * sizes.width * sizes.feed_forward_width / layout.model
    head = dtype * sizes.width * sizes.vocab_size / layout.model
    layers = {
        ("attention projections", "forward"): 2 * a + 2 * qo + 2 * kvs + attention_weights,
        ("attention projections", "backward"): 4 * (a + qo + kvs) + 2 * attention_weights,
        ("attention kernel", "forward"): 2 * qo + 2 * kvs,
        ("attention kernel", "backward"): 4 * qo + 4 * kvs,
        ("mlp projections", "forward"): 2 * a + 3 * f + mlp_weights,
        ("mlp projections", "backward"): 4 * a + 6 * f + 2 * mlp_weights,
    }
    parts = {key: sizes.num_layers * value for key, value in layers.items()}
    for part, (forward, backward) in elementwise_bytes(layout).items():
        name = "rotary, biases" if part == "rotary" else part
        parts |= {(name, "forward"): forward, (name, "backward"): backward}
    # The weights are read twice and their gradient written once, as x and its gradient are.
    parts["head, cross-entropy", "forward"] = logit_bytes(layout) + 3 * head + 3 * a
    parts["embedding", "forward"] = 2 * a
    parts["embedding", "backward"] = a + head  # the gradient of the whole table
    parts["optimizer", ""] = update_bytes(layout)
    return parts


def _sums(found: Iterable[Kernel], rates: Rates) -> tuple[int, float, float, float]:
    """(kernels, FLOPs, bytes, seconds) of a step."""
    found = list(found)
    return (
        sum(k.count for k in found),
        sum(k.count * k.flops for k in found),
        sum(k.count * (k.read + k.written) for k in found),
        sum(map(rates.seconds, found)),
    )


def _by_part(step: CompiledStep, found: list[Kernel], layout: Layout, rates: Rates) -> Table:
    table = Table(title=_title(step, layout, rates), title_justify="left")
    table.add_column("part")
    table.add_column("pass")
    for column in ("kernels", "TFLOP", "GB", "GB, least", "ms at the bound", "share"):
        table.add_column(column, justify="right")
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in found:
        groups.setdefault(part_of(kernel), []).append(kernel)
    total = _sums(found, rates)
    needed = least(layout) if layout.accumulation == 1 else {}
    passes = ["forward", "backward", ""]
    for key in [(part, d) for part in [*PARTS, "other"] for d in passes]:
        if key not in groups:
            continue
        row = _row(_sums(groups[key], rates), needed.get(key), total[3])
        table.add_row(*key, *row)
    table.add_section()
    table.add_row("sum", "", *_row(total, None, total[3]))
    return table


def _title(step: CompiledStep, layout: Layout, rates: Rates) -> str:
    return (
        f"{layout.accumulation} x {step.rows} x {layout.sequence_length} tokens on {step.target}, "
        f"remat {layout.remat}, "
        f"attention {step.attention}: kernels of the compiled program at {rates.flops / 1e12:,.0f} "
        f"TFLOP/s and {rates.bytes / 1e9:,.0f} GB/s; compiled in {step.seconds:.0f} s, peak "
        f"{step.peak_bytes / 2**30:.1f} GiB"
    )


def _row(sums, least_bytes: float | None, whole: float) -> list[str]:
    count, flops, size, seconds = sums
    return [
        f"{count:,}",
        f"{flops / 1e12:,.1f}" if flops else "",
        f"{size / 1e9:,.1f}",
        f"{least_bytes / 1e9:,.1f}" if least_bytes else "",
        f"{1e3 * seconds:,.1f}",
        f"{seconds / whole:.1%}",
    ]


def _longest(found: list[Kernel], rates: Rates, number: int) -> Table:
    table = Table(title=f"the {number} longest kernels", title_justify="left")
    for column in ("kernel", "runs", "MB read", "MB written", "ms at the bound", "ends with"):
        table.add_column(column, justify="left" if column in ("kernel", "ends with") else "right")
    for kernel in sorted(found, key=rates.seconds, reverse=True)[:number]:
        figures = (kernel.read / 1e6, kernel.written / 1e6, 1e3 * rates.seconds(kernel))
        path = kernel.path.removeprefix("jit(train_step)/")[-44:]
        table.add_row(kernel.name, str(kernel.count), *(f"{n:,.1f}" for n in figures), path)
    return table


def _side_by_side(variants: dict, rates: Rates) -> Table:
    table = Table(title="the same step otherwise", title_justify="left")
    table.add_column("config")
    for column in ("rows", "kernels", "TFLOP", "GB", "ms at the bound", "peak GiB", "compiled in"):
        table.add_column(column, justify="right")
    for name, result in variants.items():
        if result is None:  # why is on a line above the table
            table.add_row(name, "does not fit")
            continue
        step, found = result
        count, flops, size, seconds = _sums(found, rates)
        figures = [f"{flops / 1e12:,.1f}", f"{size / 1e9:,.1f}", f"{1e3 * seconds:,.1f}"]
        figures += [f"{step.peak_bytes / 2**30:.1f}", f"{step.seconds:.0f} s"]
        table.add_row(name, str(step.rows), f"{count:,}", *figures)
    return table


if __name__ == "__main__":
    main()
