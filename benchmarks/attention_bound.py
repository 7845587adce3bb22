"""What the compiler says of attention kernels: `benchmarks/attention.py --aot` prints these tables.

A bound is the time of whole rows, if each unit of the GPU's cores worked through what the kernels'
loops give it: "overlapped" takes the unit that is busy longest, "in turn" adds matrix products
(with the shared memory that feeds them) and the longest of the other units, as in a core whose one
thread block computes scores, then their exponentials. The truth lies between: the more blocks a
core holds, the nearer to the first. The instructions outside of the loops are charged once a block.
The clock is that of the data sheet's peak. TFLOP/s as in benchmarks/attention.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import sass
from jax.sharding import PartitionSpec
from rich.console import Console
from rich.table import Table

from stablelm_jax.kernels import attention_gpu, attention_mosaic, documents
from stablelm_jax.kernels import attention_mosaic_kernels as kernels
from stablelm_jax.planning.targets import Target, parse_target

# Of each kernel: its field in Blocks, and the products of a pair of query and key.
KERNELS = {
    "attention_forward": ("forward", 2),
    "attention_key_gradients": ("keys", 4),
    "attention_query_gradient": ("queries", 3),
}


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds that the whole rows of one head take on one core, by what is assumed."""

    overlapped: float
    in_turn: float
    binds: str  # the unit that is busy longest in tiles without a mask


def compiled(
    target: str, head_size: int, blocks: attention_gpu.Blocks | None = None, **shape: int
) -> dict[str, sass.Kernel]:
    """Our three kernels for that GPU, by their names of KERNELS; by default with its tiles."""
    blocks = blocks or blocks_of(parse_target(target), head_size)
    attend = partial(attention_gpu.pallas_gpu, blocks=blocks)
    return compile_gradients(target, attend, head_size, **shape)


def blocks_of(target: Target, head_size: int) -> attention_gpu.Blocks:
    generation = attention_gpu.generation_of(target.facts["name"])
    return attention_gpu.blocks_for(head_size, generation=generation)


def mosaic_blocks(head_size: int) -> attention_gpu.Blocks:
    """The tiles of `pallas_mosaic` as all warps of a program see them."""
    tiles, own = attention_mosaic.TILES[head_size], kernels.CONSUMERS * kernels.ROWS
    warps = 4 * (kernels.CONSUMERS + 1)

    def of_queries(tile):
        return attention_gpu.Tile(own, tile.streamed, warps, tile.stages)

    of_keys = attention_gpu.Tile(tiles.keys.streamed, own, warps, tiles.keys.stages)
    return attention_gpu.Blocks(of_queries(tiles.forward), of_keys, of_queries(tiles.queries))


def compiled_by_jax(target: str, head_size: int) -> tuple[dict, attention_gpu.Blocks]:
    """jax's own Mosaic attention: of causal rows it has the forward kernel, in float16."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(
        block_q=64, block_kv=128, max_concurrent_steps=2, causal=True
    )
    mesh = jax.sharding.Mesh(parse_target(target).devices()[:1], "data")
    place = jax.sharding.NamedSharding(mesh, PartitionSpec())
    q = jax.ShapeDtypeStruct((2, 4096, 2, head_size), jnp.float16, sharding=place)
    found = sass.compiled(lambda q, k, v: attention_mgpu.attention(q, k, v, config), (q, q, q))
    tile = attention_gpu.Tile(128, 128, 12, 2)
    kernel = dataclasses.replace(found.popitem()[1], name="attention_forward")
    return {kernel.name: kernel}, attention_gpu.Blocks(tile, tile, tile)


def compile_gradients(
    target: str, attend: Callable[..., jax.Array], head_size: int, length=4096, heads=2, kv_heads=2
) -> dict[str, sass.Kernel]:
    """The kernels of an implementation, forward and backward, two rows in bfloat16."""
    mesh = jax.sharding.Mesh(parse_target(target).devices()[:1], "data")
    place = jax.sharding.NamedSharding(mesh, PartitionSpec())

    def struct(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    # jax 0.12 asks the mesh which GPU it compiles for.
    whole = PartitionSpec()

    @partial(jax.shard_map, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    def run(q, k, v, do, segments):
        out, backward = jax.vjp(lambda *qkv: attend(*qkv, segments), q, k, v)
        return out, *backward(do)

    q, k = (struct(2, length, n, head_size) for n in (heads, kv_heads))
    return sass.compiled(run, (q, k, k, q, struct(2, length, dtype=jnp.int32)))


def bound(
    kernel: sass.Kernel, tile: documents.Tile, head_size: int, target: Target, length: int = 4096
) -> Bound:
    """Of whole rows of `length` tokens."""
    field, products = KERNELS[kernel.name]
    rows = _whole_rows(tile, length, by_keys=field == "keys")
    unmasked = sum(whole_end - whole_begin for _, whole_begin, whole_end, _ in rows)
    tiles = {False: unmasked, True: sum(end - begin for begin, _, _, end in rows) - unmasked}
    shares = tile.queries * tile.keys / (32 * kernel.scores(products, head_size))  # warps of a tile
    overlapped = in_turn = len(rows) * kernel.outside * kernel.threads / 32 / 4
    facts = target.facts
    clock = target.peak_flops / (2 * sass.multiply_adds_a_cycle(facts) * facts["cores"])
    for masked, number in tiles.items():
        cycles = kernel.cycles(facts, masked=masked)
        products_time = max(cycles["matrix"], cycles["shared"])
        others = max(time for unit, time in cycles.items() if unit not in ("matrix", "shared"))
        overlapped += number * shares * max(cycles.values())
        in_turn += number * shares * (products_time + others)
    busiest = kernel.cycles(facts)
    return Bound(overlapped / clock, in_turn / clock, max(busiest, key=busiest.get))


def _whole_rows(tile: documents.Tile, length: int, by_keys: bool) -> list[list[int]]:
    if by_keys:
        ends = jnp.full((1, length), length, jnp.int32)
        return documents.key_block_bounds(ends, tile)[0].tolist()
    return documents.query_block_bounds(jnp.zeros((1, length), jnp.int32), tile)[0].tolist()


def tflops(seconds: float, flops_a_pair: int, head_size: int, target: Target, length=4096) -> float:
    """Of a GPU with all cores at work; flops_a_pair: 2 forward, 5 backward, per H and T * T."""
    return flops_a_pair * head_size * length**2 * target.facts["cores"] / seconds / 1e12


def show(console: Console, targets: list[str], head_sizes: list[int]) -> None:
    """Tables of each target and head size, as they come."""
    for name in targets:
        target = parse_target(name)
        peak = f"{target.peak_flops / 1e12:.0f} TFLOP/s, {target.facts['cores']} cores"
        clock = target.peak_flops / 2 / sass.multiply_adds_a_cycle(target.facts)
        clock = f"{clock / target.facts['cores'] / 1e9:.2f} GHz"
        for size in head_sizes:
            title = f"{{}} for {name} ({peak}, {clock}), heads of {size}, 16 bits"
            contestants = {"pallas_gpu": (compiled(name, size), blocks_of(target, size))}
            if "sm90" == attention_gpu.generation_of(target.facts["name"]):
                if size in attention_mosaic.TILES:
                    made = compile_gradients(name, attention_mosaic.pallas_mosaic, size)
                    contestants["pallas_mosaic"] = made, mosaic_blocks(size)
                if size % 64 == 0:
                    contestants["jax's Mosaic (float16)"] = compiled_by_jax(name, size)
            for implementation, (made, blocks) in contestants.items():
                console.print(made_of(title.format(implementation), made, blocks, target, size))
                console.print(bounds(made, blocks, target, size))


def made_of(title, made, blocks, target, head_size) -> Table:
    """What each kernel needs and issues; where two numbers stand, tiles without mask and with."""
    table = Table("kernel", title=title, title_justify="left")
    for column in (
        *("tile", "registers", "spills B", "shared KiB", "blocks a core", "loads ahead"),
        *("instructions", "a score", "MUFU", "FMA", "compare", "matrix instructions"),
    ):
        table.add_column(column, justify="right")
    for name, kernel in made.items():
        field, products = KERNELS[name]
        tile = getattr(blocks, field)
        scores = kernel.scores(products, head_size)
        both = [kernel.count(masked=masked) for masked in (False, True)]
        count = lambda *names: f"{kernel.count(*names) / scores:.2f}"  # noqa: B023, E731
        ahead = tile.stages - 1 if kernel.loads_ahead is None else kernel.loads_ahead
        table.add_row(
            name.removeprefix("attention_"),
            f"{tile.queries}x{tile.keys} w{tile.warps} s{tile.stages}",
            f"{kernel.registers}",
            f"{kernel.spills}",
            f"{kernel.shared / 1024:.0f}",
            f"{kernel.blocks_a_core(target.facts)}",
            "serialised" if kernel.serialised else f"{ahead}",
            "/".join(f"{n}" for n in both),
            "/".join(f"{n / scores:.1f}" for n in both),
            count("MUFU"),
            count("FFMA", "FMUL", "FADD"),
            count("FSETP", "ISETP", "SEL", "FSEL"),
            ", ".join(f"{n} {shape}" for shape, n in kernel.shapes.items()),
        )
    return table


def bounds(made, blocks, target, head_size) -> Table:
    """Cycles of a core for 1,024 scores, by unit, and TFLOP/s of whole rows."""
    table = Table("cycles for 1,024 scores")
    for column in (*sass.UNITS, "binds", "TFLOP/s overlapped", "in turn"):
        table.add_column(column, justify="right")
    seconds = {}
    for name, kernel in made.items():
        field, products = KERNELS[name]
        tile = getattr(blocks, field)
        found = seconds[field] = bound(kernel, tile, head_size, target)
        per = 1024 / (32 * kernel.scores(products, head_size))
        plain, masked = (kernel.cycles(target.facts, masked=m) for m in (False, True))
        cells = [f"{per * plain[u]:.0f}/{per * masked[u]:.0f}" for u in sass.UNITS]
        cells += [found.binds]
        if field == "forward":
            cells += _pair([found], 2, head_size, target)
        table.add_row(name.removeprefix("attention_"), *cells)
    if "keys" in seconds:
        both = [seconds["keys"], seconds["queries"]]
        empty = [""] * (len(sass.UNITS) + 1)
        table.add_row("backward", *empty, *_pair(both, 5, head_size, target))
    return table


def _pair(found: list[Bound], flops: int, head_size: int, target: Target) -> list[str]:
    times = sum(b.overlapped for b in found), sum(b.in_turn for b in found)
    return [f"{tflops(time, flops, head_size, target):.0f}" for time in times]
