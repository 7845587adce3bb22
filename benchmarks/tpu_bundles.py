"""Attention on TPUs by its compilers' bundles: ours beside jax's splash, and which unit is busy.

    python benchmarks/tpu_bundles.py                      # v5e, v5p, v6e, v4, head size 64
    python benchmarks/tpu_bundles.py --targets v5p:2x2x1 --head-size 160

A bundle is what a core issues in a cycle. The compilers of extra `aot` write down how many a kernel
has and which units each of them uses; a loop's body counts once. Of ours, the bodies of the loops
over tiles are taken apart by compiling the kernel with all of them, with some and with none; beside
them is what a row costs, or a block of it: what compilers take out of a loop too. "busy" is the
share of the bundles in which the matrix unit's slots are taken, the vector unit's, the one slot for
stores, and of that what registers spill.

From that a time for whole rows: bundles of all visited tiles / clock / cores. jax's splash in
blocks of 1024 on a v5p comes to 2.5 ms forward for 4 x 4096 tokens and 32 heads; 2.6 ms were
measured there (tokamax's tuning data). Nothing here has run on a TPU.
"""

from __future__ import annotations

import argparse
import glob
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

LENGTH, ROWS = 4096, 4
# Cores of a chip, and GHz: the data sheet's peak divided by the work of its matrix units.
CORES_AND_CLOCK = {"v4": (2, 1.05), "v5e": (1, 1.5), "v5p": (2, 1.75), "v6e": (1, 1.75)}
UNITS = ("MXU", "VALU", "VSTORE", "VSTORE:SPILL")
# Which of a kernel's three loops over tiles to compile: with a mask, without, with one.
VISITED = {"none": (), "whole": (1,), "masks": (0, 2), "all": (0, 1, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    targets = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "v4:2x2x1"]
    parser.add_argument("--targets", nargs="+", default=targets)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--compile", nargs=2, help=argparse.SUPPRESS)  # target, what: a child's
    arguments = parser.parse_args()
    if arguments.compile:
        _compile(*arguments.compile, arguments.head_size)
        return
    from rich.console import Console

    console = Console(width=130)
    for target in arguments.targets:
        console.print(_table(target, arguments.head_size))


def _table(target: str, head_size: int):
    from rich.table import Table

    heads = 2048 // head_size
    title = f"{target}: {ROWS} x {LENGTH} tokens, {heads} heads of {head_size}, bfloat16, causal"
    table = Table(title=title, title_justify="left")
    for column in ("kernel", "bundles a tile", "per 1,000 pairs", "beside tiles", *UNITS, "ms"):
        table.add_column(column, justify="right")
    for row in _rows(target, head_size, heads):
        table.add_row(*row)
    return table


def _rows(target: str, head_size: int, heads: int):
    cores, clock = CORES_AND_CLOCK[target.partition(":")[0]]
    milliseconds = 1e3 * ROWS * heads / (cores * clock * 1e9)
    for block in (512, 1024):
        kernels = _bundles(target, f"splash {block}", head_size)
        tiles = _tiles(block)
        for name, (count, used) in kernels.items():
            time = milliseconds * count * sum(tiles)
            yield _row(f"splash {block} {name}", block, count, 0, used, time)
    own = {part: _bundles(target, part, head_size) for part in VISITED}
    for name in own["none"]:
        if name not in own["all"]:  # did not fit
            continue
        whole, masked, beside = _parts({part: own[part][name] for part in own})
        times = beside * LENGTH // 512
        if name == "backward":  # beside the loops over a block's tiles, some is once for the row
            times -= own["none"][name][0] * (LENGTH // 512 - 1)
        row = times
        for part, (count, used), number in zip(("whole", "masked"), (whole, masked), _tiles(512)):
            times += number * count
            total = milliseconds * times if part == "masked" else None
            yield _row(f"ours, {name}, {part} tiles", 512, count, row, used, total)


def _parts(kernels):
    """Bundles and use of the body for tiles without a mask, of that with one; bundles beside them.

    A kernel has one loop for the first and two alike for the second.
    """

    def body(part: str, other: str, copies: int):
        (more, used), (less, used_less) = kernels[part], kernels[other]
        return (more - less) // copies, {u: (used[u] - used_less[u]) / copies for u in UNITS}

    masked, whole = body("all", "whole", 2), body("all", "masks", 1)
    return whole, masked, kernels["whole"][0] - whole[0]


def _row(name, block, count, beside, used, milliseconds):
    shares = [f"{used[unit] / count:.0%}" for unit in UNITS]
    time = "" if milliseconds is None else f"{milliseconds:.2f}"
    return name, f"{count:,}", f"{1e3 * count / block**2:.2f}", f"{beside:,}", *shares, time


def _tiles(block: int) -> tuple[int, int]:
    """Tiles below the diagonal and on it."""
    blocks = LENGTH // block
    return blocks * (blocks - 1) // 2, blocks


def _bundles(target: str, what: str, head_size: int) -> dict[str, tuple[int, dict[str, float]]]:
    """By kernel its bundles, and in how many of them each unit is busy (part of its slots counts
    as part of a bundle). libtpu reads its flags once, so a child asks."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        flags += " --xla_jf_dump_llo_pass_label_regex=final_hlo-static-per-bundle.*"
        environment = os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, __file__, "--compile", target, what]
        subprocess.run(
            [*command, "--head-size", str(head_size)],
            env=environment | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
            check=True,
            stderr=subprocess.DEVNULL,
        )
        names = {
            "attention_forward": "forward",
            "attention_gradients": "backward",
            "mha_fwd": "forward",
            "mha_dq_": "dq",
            "mha_dkv": "dk and dv",
        }
        found = {}
        for path in glob.glob(f"{folder}/*per-bundle-utilization*"):
            for part, name in names.items():
                if part in path:
                    found[name] = _read(Path(path).read_text())
        return {name: found[name] for name in names.values() if name in found}


def _read(text: str) -> tuple[int, dict[str, float]]:
    lines = text.splitlines()
    units = [name.strip() for name in lines[1].split(",")]
    slots = [int(n) for n in lines[2].split()]
    bundles = [[int(n) for n in line.split()] for line in lines[4:] if line.strip()]
    columns = zip(*bundles, strict=True)
    busy = {unit: sum(used) / count for unit, count, used in zip(units, slots, columns)}
    return len(bundles), busy


def _compile(target: str, what: str, head_size: int) -> None:
    """Writes nothing itself: the compiler does, into the folder of its flags."""
    import jax
    import jax.numpy as jnp

    from stablelm_jax.kernels import attention_splash, attention_tpu
    from stablelm_jax.planning.targets import parse_target

    if what.startswith("splash"):
        attention_splash.BLOCK = int(what.split()[1])
        implementation = attention_splash.splash
    else:
        attention_tpu._visit = partial(_visit_only, what)
        implementation = attention_tpu.pallas_tpu
    place = jax.sharding.SingleDeviceSharding(parse_target(target).devices()[0])

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def gradients(q, k, v, segments, do):
        out, backward = jax.vjp(lambda *x: implementation(*x, segments), q, k, v)
        return out, *backward(do)

    q, segments = array(1, LENGTH, 2, head_size), array(1, LENGTH, dtype=jnp.int32)
    try:
        jax.jit(gradients).lower(q, q, q, segments, q).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # too large: its bundles are not written
            raise


def _visit_only(what: str, bounds, block, step) -> None:
    """`attention_tpu._visit` with some of its three loops."""
    import jax

    for border in VISITED[what]:
        begin, end = bounds[4 * block + border], bounds[4 * block + border + 1]
        jax.lax.fori_loop(begin, end, partial(step, border != 1), None)


if __name__ == "__main__":
    main()
