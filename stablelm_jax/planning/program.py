"""Reading a compiled program: which collectives run, how often, over which mesh axis.

The text of an optimised program is a list of computations. An instruction inside the body of a loop
runs as often as the loop turns, so computations are walked from the entry with their counts.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "u4": 4, "s4": 4}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b(pred|bf16|[a-z]\d+\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"\b(?:body|calls|to_apply|async_execution_thread_body)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of communication of a step."""

    kind: str  # one of KINDS
    axis: str  # of the mesh, or several as in 'data+model'; 'other' for groups that are no axes
    dtype: str  # as the program spells it
    size: int  # bytes of the whole array, summed over `count` runs
    devices: int  # how many take part in each run
    count: int  # runs in a step; once, where a loop's turns cannot be read

    @property
    def sent(self) -> int:
        """Bytes that a device sends, if the array goes round a ring."""
        if self.kind == "collective-permute":
            return self.size
        rounds = 2 if self.kind == "all-reduce" else 1
        return int(rounds * self.size * (self.devices - 1) / self.devices)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = type op(operands), attributes`; `rest` is what follows the bracket."""

    root: bool
    name: str
    type: str
    op: str
    rest: str

    @property
    def kind(self) -> str | None:
        """Its collective; the `-done` half of an asynchronous one does not count again."""
        kind = self.op.removesuffix("-start")
        return kind if kind in KINDS else None

    @property
    def called(self) -> list[str]:
        """Names of the computations that run inside it, except a loop's condition."""
        many = re.findall(r"\bbranch_computations=\{([^}]*)\}", self.rest)
        branches = [name.strip().lstrip("%") for group in many for name in group.split(",")]
        return _CALLED.findall(self.rest) + branches


Computations = dict[str, list[Instruction]]


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives of a program compiled for `mesh`, equal ones together, largest first.

    Args:
      text: `compiled.as_text()`.
      mesh: sizes of the mesh axes by name, outermost first.
    """
    sizes, counts = collections.Counter(), collections.Counter()
    for _, instruction, times in walk(*computations_of(text), lambda i: i.kind is not None):
        axis, devices = _axis(instruction.rest, mesh)
        if devices == 1 and instruction.kind != "collective-permute":
            continue
        for dtype, size in _payload(instruction).items():
            sizes[instruction.kind, axis, dtype, devices] += size * times
            counts[instruction.kind, axis, dtype, devices] += times
    return [
        Collective(kind, axis, dtype, size, devices, counts[kind, axis, dtype, devices])
        for (kind, axis, dtype, devices), size in sizes.most_common()
    ]


def computations_of(text: str) -> tuple[Computations, str]:
    """The instructions of each computation of a program, and the name of the entry."""
    found: Computations = {}
    entry, current = "", None
    for line in text.splitlines():
        if opening := _COMPUTATION.match(line):
            current = found.setdefault(opening[2], [])
            entry = opening[2] if opening[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(Instruction(match[1] is not None, *match.groups()[1:]))
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY")
    return found, entry


def walk(
    computations: Computations, name: str, wanted: Callable[[Instruction], bool], times: int = 1
) -> Iterator[tuple[str, Instruction, int]]:
    """Every wanted instruction reached from a computation: where it stands, and how often it runs.

    What a wanted instruction calls is not looked into.
    """
    for instruction in computations.get(name, ()):
        if wanted(instruction):
            yield name, instruction, times
            continue
        turns = _turns(instruction.rest, computations) if instruction.op == "while" else 1
        for called in instruction.called:
            yield from walk(computations, called, wanted, times * turns)


def array_bytes(type_text: str) -> list[tuple[str, int]]:
    """(dtype, bytes) of each array of a type, as in `(f32[8], s32[])`."""
    found = []
    for dtype, dims in _SHAPE.findall(type_text):
        bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
        found.append((dtype, math.prod(map(int, dims.split(",") if dims else ())) * bits // 8))
    return found


def _turns(rest: str, computations: Computations) -> int:
    """How often a loop turns: said by the GPU compiler; the TPU's condition is i < constant."""
    if stated := _TRIPS.search(rest):
        return int(stated[1])
    named = re.search(r"\bcondition=%?([\w.\-]+)", rest)
    condition = {i.name: i for i in computations.get(named[1] if named else "", ())}
    for instruction in condition.values():
        if instruction.op == "compare" and "direction=LT" in instruction.rest:
            bound = condition.get(re.match(r"%?[\w.\-]+, %?([\w.\-]+)\)", instruction.rest)[1])
            if bound and bound.op == "constant":
                return int(bound.rest.split(")")[0])
    return 1


def _payload(instruction: Instruction) -> dict[str, int]:
    """Bytes of the whole array by type: the larger of what goes in and what comes out."""
    shapes = array_bytes(instruction.type)
    paired = instruction.op.endswith("-start") and instruction.kind != "all-reduce"
    if paired:  # (inputs, outputs), and for a permute two words of context
        shapes = [s for s in shapes if s != ("u32", 4)] or shapes
        half = len(shapes) // 2
        shapes = max(shapes[:half], shapes[half:], key=lambda side: sum(size for _, size in side))
    elif instruction.kind == "reduce-scatter":  # the type is that of the part that stays
        devices = _groups(instruction.rest).shape[1]
        shapes = [(dtype, size * devices) for dtype, size in shapes]
    totals = collections.Counter()
    for dtype, size in shapes:
        totals[dtype] += size
    return totals


def _axis(rest: str, mesh: Mapping[str, int]) -> tuple[str, int]:
    """The mesh axis that a collective goes along, or several, and the devices of one group."""
    names = [name for name, size in mesh.items() if size > 1]
    ids = np.arange(math.prod(mesh.values())).reshape([mesh[name] for name in names])
    if "source_target_pairs" in rest:
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)[1]
        ends = [np.argwhere(ids == int(end))[0] for end in re.findall(r"\d+", pairs)[:2]]
        moved = [name for name, a, b in zip(names, *ends) if a != b]
        return "+".join(moved), 2
    groups = _groups(rest)
    first = sorted(groups[0].tolist()) if groups.size else ids.ravel().tolist()
    for count in range(1, len(names) + 1):
        for axes in itertools.combinations(range(len(names)), count):
            line = ids[tuple(slice(None) if d in axes else 0 for d in range(len(names)))]
            if first == line.ravel().tolist():
                return "+".join(names[d] for d in axes), len(first)
    return "other", len(first)


def _groups(rest: str) -> np.ndarray:
    """Device ids, [groups, devices of a group], from any of the three ways XLA writes them."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        dims = [int(n) for n in found[3].split(",")]
        ids = np.arange(math.prod(dims)).reshape(dims)
        if found[4]:
            ids = ids.transpose([int(n) for n in found[4].split(",")])
        return ids.reshape(int(found[1]), int(found[2]))
    if found := re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        along = re.findall(r"'(\w+)'", found[2])
        order = sorted(range(len(sizes)), key=lambda i: list(sizes)[i] in along)
        ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        return ids.transpose(order).reshape(-1, math.prod(sizes[name] for name in along))
    found = re.search(r"replica_groups=\{(\{.*?\})\}", rest)
    if not found:
        return np.zeros((0, 0), int)
    rows = [[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", found[1])]
    return np.array(rows)
