"""What NVIDIA's compiler made of a kernel: instructions, registers, spills, shared memory.

Needs extra `aot` and no GPU: jax compiles ahead of time and writes down PTX, `ptxas` makes machine
code of it (SASS), `nvdisasm` lists that. Of a kernel's loops those count whose bodies hold matrix
instructions and no other such loop. A body is read as the ways through it: the shortest is that of
a tile without a mask, the longest that of a masked one; of several loops, over all of them.

What cannot be seen here: caches, latencies, how well units overlap, clocks.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

# Of one core (SM) with its four schedulers; CUDA programming guide, table of arithmetic throughput.
SHARED_BYTES_A_CYCLE = 128
EXPONENTIALS_A_CYCLE = 16
ALU_LANES = 64  # comparisons, minima, selections, conversions, integers
_ALU = {"FMNMX", "FSETP", "ISETP", "SEL", "FSEL", "LOP3", "IADD3", "SHF", "PRMT", "F2FP", "LEA"}
_ALU |= {"IMNMX", "VIMNMX", "VIADD", "PLOP3", "FMNMX3"}
_FMA = {"FFMA", "FMUL", "FADD"}

# The first two as on a machine whose environment does not ask for less, as the tests' does; the
# last is what jax 0.12 needs to write PTX down.
_OPTIONS = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_dump_emitter_re": "ptx",
}

UNITS = ("matrix", "exponentials", "issue", "fma", "alu", "shared")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel as compiled; whole and masked: the instructions of a tile, as SASS lines."""

    name: str
    threads: int
    registers: int
    spills: int  # bytes of registers that had to be stored
    shared: int  # bytes
    warnings: tuple[str, ...]  # of ptxas
    whole: tuple[str, ...]
    masked: tuple[str, ...]
    outside: int  # instructions outside of these loops: each runs about once

    @property
    def serialised(self) -> bool:
        """ptxas put a wait after each wgmma: none overlaps anything."""
        return any("serializ" in line for line in self.warnings)

    @property
    def loads_ahead(self) -> int | None:
        """Groups of loads that may be under way as a tile begins; None: no asynchronous loads."""
        waits = [re.search(r"DEPBAR\.LE SB0, 0x(\w+)", line) for line in self.whole]
        return min((int(found[1], 16) for found in waits if found), default=None)

    @property
    def shapes(self) -> dict[str, int]:
        """Matrix instructions of a tile by shape; "ss": wgmma's factors both from shared memory."""
        counts: dict[str, int] = {}
        for line in self.whole:
            if shape := _matrix_shape(line):
                counts[shape] = counts.get(shape, 0) + 1
        return counts

    def blocks_a_core(self, facts: dict[str, Any]) -> int:
        """How many thread blocks (CTAs) a core holds at a time; facts: of chips.json."""
        warps = self.threads // 32
        registers = -(-self.registers // 8) * 8 * 32 * warps
        shared = self.shared + 1024  # the driver's own part of each block
        fits = 65536 // registers, 2048 // self.threads, (facts["shared_kib"] << 10) // shared
        return min(*fits, 32)

    def count(self, *names: str, masked: bool = False) -> int:
        """Instructions of a thread and tile with these opcodes; with no names all of them."""
        lines = self.masked if masked else self.whole
        return sum(not names or opcode(line).partition(".")[0] in names for line in lines)

    def scores(self, products: int, head_size: int) -> float:
        """Scores a thread computes in a tile: its matrix work by that of a score."""
        work = sum(_multiply_adds(line) for line in self.whole)
        return work / 32 / (products * head_size)

    def cycles(self, facts: dict[str, Any], *, masked: bool = False) -> dict[str, float]:
        """Cycles for which one warp's share of a tile keeps each of a core's units busy."""
        lines = self.masked if masked else self.whole
        total = dict.fromkeys(UNITS, 0.0)
        for line in lines:
            for unit, cycles in _cost(line, facts).items():
                total[unit] += cycles
        return total


def multiply_adds_a_cycle(facts: dict[str, Any]) -> int:
    """Of one core's matrix units in 16 bits, dense (data sheets of A100 and H100)."""
    return {8: 1024, 9: 2048}[facts["compute_capability"][0]]


def opcode(line: str) -> str:
    words = line.split()
    return words[1] if words[0].startswith("@") else words[0]


def _cost(line: str, facts: dict[str, Any]) -> dict[str, float]:
    """Cycles of each unit of a core for one instruction of one warp."""
    name, *modifiers = opcode(line).split(".")
    cost = {"issue": 1 / 4}
    if line.startswith("@!PT"):  # never done
        return cost
    if work := _multiply_adds(line):
        slower = 2 if "TF32" in modifiers else 1
        cost["matrix"] = slower * work / multiply_adds_a_cycle(facts)
    if name == "MUFU":
        cost["exponentials"] = 32 / EXPONENTIALS_A_CYCLE
    elif name in _FMA:
        cost["fma"] = 32 / facts["lanes_per_core"]
    elif name == "IMAD":
        cost["fma"] = 32 / 64
    elif name in _ALU:
        cost["alu"] = 32 / ALU_LANES
    if moved := _shared_bytes(line):
        cost["shared"] = moved / SHARED_BYTES_A_CYCLE
    return cost


def _multiply_adds(line: str) -> int:
    """Of one warp; a wgmma is the work of four."""
    name = opcode(line)
    if found := re.match(r"HGMMA\.64x(\d+)x(\d+)", name):
        return 64 * int(found[1]) * int(found[2]) // 4
    if found := re.match(r"HMMA\.168(8|16)\b", name):
        return 16 * 8 * int(found[1])
    return 0


def _matrix_shape(line: str) -> str | None:
    name = opcode(line)
    if found := re.match(r"HGMMA\.64x(\d+)x\d+", name):
        return f"n{found[1]} {'ss' if _both_shared(line) else 'rs'}"
    return "m16n8" if name.startswith("HMMA") else None


def _both_shared(line: str) -> bool:
    return re.search(r"HGMMA\S* R\d+, gdesc", line) is not None


def _shared_bytes(line: str) -> int:
    """Bytes of shared memory that one warp's instruction reads or writes."""
    name, *modifiers = opcode(line).split(".")
    if name == "HGMMA":
        columns, depth = map(int, modifiers[0].split("x")[1:])
        size = 32 // depth  # bytes of an element: a row of a wgmma's factor has 32
        rows = (64 if _both_shared(line) else 0) + columns
        return rows * depth * size // 4
    if name in ("LDSM", "STSM"):
        return 128 * next((int(m) for m in modifiers if m in ("2", "4")), 1)
    if name in ("LDS", "STS", "LDGSTS"):
        return 32 * next((int(m) // 8 for m in modifiers if m in ("64", "128")), 4)
    return 0


def compiled(
    function: Callable[..., Any], arguments: tuple[Any, ...], loops: bool = True
) -> dict[str, Kernel]:
    """The kernels of a function by name, for the GPU of its arguments' sharding.

    loops: only those with matrix loops.

    arguments: `jax.ShapeDtypeStruct`s with a sharding on devices of a target (planning/targets).
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        try:
            jax.jit(function).lower(*arguments).compile(_OPTIONS | {"xla_dump_to": folder})
        finally:
            del os.environ["MOSAIC_GPU_DUMP_TO"]
        launches = _launches("".join(p.read_text() for p in Path(folder).glob("*thunk_sequence.*")))
        texts = [p.read_text() for p in Path(folder).glob("*.ptx")]
        of_mosaic = _of_mosaic(Path(folder))
    if loops:  # of those with matrix products alone: mma.sync, wgmma.mma_async
        texts = [ptx for ptx in texts if "mma" in ptx]
    names = [(ptx, name) for ptx in texts for name in re.findall(r"\.entry (\w+)\(", ptx)]
    kernels = [read(ptx, name, *launches[name]) for ptx, name in names if name in launches]
    found = of_mosaic | {kernel.name: kernel for kernel in kernels if kernel.whole or not loops}
    return dict(sorted(found.items()))


def _of_mosaic(folder: Path) -> dict[str, Kernel]:
    """The kernels that Mosaic GPU compiled: by their own names, of each the last."""
    found = {}
    for path in folder.glob("*.mlir-passes.log"):
        ptx = path.with_name(path.name.replace(".mlir-passes.log", ".ptx")).read_text()
        name, threads = re.search(r"\.entry (\w+)\([\s\S]*?\.maxntid (\d+)", ptx).groups()
        shared = re.search(r"dynamic_shared_memory_size %c(\d+)", path.read_text())[1]
        kernel = read(ptx, name, int(threads), int(shared))
        name = name.removesuffix("_mosaic_gpu_kernel")
        found[name] = dataclasses.replace(kernel, name=name)
    return found


def _launches(text: str) -> dict[str, tuple[int, int]]:
    """By kernel: threads of a block, and bytes of shared memory that its launch asks for."""
    pattern = r"(\w+) grid: \[.*?\] threads: \[(\d+), 1, 1\]\s+shared_memory: (\d+)"
    return {name: (int(threads), int(size)) for name, threads, size in re.findall(pattern, text)}


def read(ptx: str, name: str, threads: int, shared: int) -> Kernel:
    """A kernel of one entry from its PTX; shared: bytes that the launch adds to its own."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        target = re.search(r"\.target (\w+)", ptx)[1]
        said = _tool("ptxas", "-v", "-arch", target, str(source), "-o", str(cubin)).stderr
        listing = _tool("nvdisasm", "--print-code", str(cubin)).stdout
    whole, masked, outside = ways(listing)
    own = re.search(r"(\d+) bytes smem", said)
    return Kernel(
        name=name,
        threads=threads,
        registers=int(re.search(r"Used (\d+) registers", said)[1]),
        spills=int(re.search(r"(\d+) bytes spill stores", said)[1]),
        shared=shared + (int(own[1]) if own else 0),
        warnings=tuple(line for line in said.splitlines() if _warns(line)),
        whole=whole,
        masked=masked,
        outside=outside,
    )


def _warns(line: str) -> bool:
    """Also where it only informs that products wait for each other."""
    return "info" not in line.split(":")[0] or "Performance Loss" in line


def tool(name: str) -> Path | None:
    """Where that program of extra `aot` lies."""
    package = importlib.util.find_spec("nvidia")
    roots = package.submodule_search_locations if package else ()
    return next((p for root in roots for p in Path(root).glob(f"cu*/bin/{name}")), None)


def _tool(name: str, *arguments: str) -> subprocess.CompletedProcess:
    path = tool(name)
    if path is None:
        raise FileNotFoundError(f"no {name} here: pip install -e '.[aot]'")
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True)


def ways(listing: str) -> tuple[tuple[str, ...], tuple[str, ...], int]:
    """Shortest and longest way through a matrix loop's body, and the instructions outside of these
    loops; nothing and 0 for a kernel that has none."""
    lines, labels = _parse(listing)
    loops = _matrix_loops(lines, labels)
    if not loops:
        return (), (), 0
    shortest = min((_way(lines, labels, *loop, longest=False) for loop in loops), key=len)
    longest = max((_way(lines, labels, *loop, longest=True) for loop in loops), key=len)
    return shortest, longest, len(lines) - sum(end + 1 - begin for begin, end in loops)


def _parse(listing: str) -> tuple[list[str], dict[str, int]]:
    """The instructions, and which of them each label stands before."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\s+/\*\w+\*/\s+\{?\s*(.+?)\s*;", line):
            if opcode(found[1]) != "NOP":
                lines.append(found[1])
    return lines, labels


def _target(line: str, labels: dict[str, int]) -> int | None:
    found = re.search(r"\bBRA\b.*`\((\.L\w+)\)", line)
    return labels.get(found[1]) if found else None


def _matrix_loops(lines, labels) -> list[tuple[int, int]]:
    """First and last instruction of each."""
    back: dict[int, int] = {}
    exits = [at for at, line in enumerate(lines) if opcode(line) == "EXIT" and line[0] != "@"]
    # After the last exit stand second tries of waits, which jump back to where they came from.
    for at, line in enumerate(lines[: exits[-1]] if exits else lines):
        to = _target(line, labels)
        if to is not None and to <= at and any(map(_multiply_adds, lines[to:at])):
            back[to] = at  # of several jumps to one head the last closes the loop
    loops = list(back.items())
    inside = lambda a, b: b[0] <= a[0] and a[1] <= b[1] and a != b  # noqa: E731
    return [loop for loop in loops if not any(inside(other, loop) for other in loops)]


def _way(lines, labels, begin: int, end: int, longest: bool) -> tuple[str, ...]:
    """The shortest or longest way from a loop's first to its last instruction."""
    length, before = {begin: 0}, {}
    for at in range(begin, end):
        if at not in length:
            continue
        to = _target(lines[at], labels)
        always = to is not None and not lines[at].startswith("@")
        nexts = [] if always else [at + 1]
        if to is not None and at < to <= end:
            nexts.append(to)
        for then in nexts:
            if then not in length or longest == (length[at] + 1 > length[then]):
                length[then], before[then] = length[at] + 1, at
    way = [end]
    while way[-1] != begin:
        way.append(before[way[-1]])
    return tuple(lines[at] for at in reversed(way))
