"""Reading a compiled program: which kernels run, what each reads and writes, what it multiplies.

For programs of GPUs and CPUs; those of TPUs write products as convolutions, which are not counted.
Bytes are of arrays in memory: each operand that a kernel reads and each result that it writes, once
each, so a kernel moves at least these unless a cache holds them. Of what is only sliced, the slice
counts; an update in place reads and writes only what is new.
"""

from __future__ import annotations

import dataclasses
import math
import re

from stablelm_jax.planning.program import (
    Computations,
    Instruction,
    array_bytes,
    computations_of,
    walk,
)

_CONTROL = ("while", "call", "conditional", "async-start")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all")
_SAME_BYTES = ("bitcast", "reshape")  # in a fusion: another view of what they take
_SLICES = ("dynamic-slice", "slice", "gather")

Scope = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An instruction that runs as a kernel.

    Attributes:
      name, op: in the program. path: jax's scopes around the operation that it ends with, the
        outermost first. count: how often it runs in a step.
      read, written: bytes of one run.
      flops: the work of a run's matrix products; 0 where the program does not say it, as for a
        kernel that is not the compiler's.
    """

    name: str
    op: str
    path: str
    count: int
    read: int
    written: int
    flops: int


def kernels(text: str) -> list[Kernel]:
    """The kernels of a program's text, `compiled.as_text()`, in the order of their first run."""
    computations, entry = computations_of(text)
    scopes = {name: {i.name: i for i in found} for name, found in computations.items()}
    return [
        Kernel(
            name=instruction.name,
            op=instruction.op,
            path=_path(instruction, computations),
            count=times,
            read=sum(
                _read(scopes[where], instruction, operand, scopes)
                for operand in dict.fromkeys(operands_of(instruction))
            ),
            written=_written(scopes[where], instruction, scopes),
            flops=_flops(scopes[where], instruction, scopes),
        )
        for where, instruction, times in walk(computations, entry, _runs)
    ]


def operands_of(instruction: Instruction) -> list[str]:
    """Names of the instructions whose results it takes."""
    inside = re.sub(r"/\*.*?\*/", "", re.split(r"\)(?:, |$)", instruction.rest)[0])
    return [part.split()[-1].lstrip("%") for part in inside.split(", ") if part]


def dims_of(type_text: str) -> list[int]:
    """Dims of the first array of a type."""
    dims = re.search(r"\[([\d,]*)\]", type_text)[1]
    return [int(n) for n in dims.split(",")] if dims else []


def _runs(instruction: Instruction) -> bool:
    op = instruction.op
    return op not in _CONTROL and op not in _FREE and not op.endswith("-done")


def _size(instruction: Instruction | None) -> int:
    return sum(size for _, size in array_bytes(instruction.type)) if instruction else 0


def _read(scope: Scope, user: Instruction, operand: str, scopes: dict[str, Scope]) -> int:
    """Bytes of `operand` that `user` reads."""
    whole = _size(scope.get(operand))
    if user.op == "fusion":
        inner = scopes[user.called[0]]
        places = [i for i, name in enumerate(operands_of(user)) if name == operand]
        return min(whole, sum(_read_inside(inner, f"{place})", scopes) for place in places))
    first = operands_of(user)[0] == operand
    if first and user.op in _SLICES:
        return _size(user)
    if first and user.op == "dynamic-update-slice":
        return 0
    if first and user.op == "scatter":
        return _size(scope.get(operands_of(user)[-1]))
    return whole


def _read_inside(inner: Scope, place: str, scopes: dict[str, Scope]) -> int:
    """Bytes that a fusion reads of its parameter at a place, written as in `parameter(3)`."""
    parameter = next(i for i in inner.values() if i.op == "parameter" and i.rest.startswith(place))

    def of_users(name: str) -> int:
        total = 0
        for user in inner.values():
            if name in operands_of(user):
                same = user.op in _SAME_BYTES
                total += of_users(user.name) if same else _read(inner, user, name, scopes)
        return min(_size(inner[name]), total)

    return of_users(parameter.name)


def _written(scope: Scope, instruction: Instruction, scopes: dict[str, Scope]) -> int:
    if instruction.op == "fusion":
        inner = scopes[instruction.called[0]]
        return _written(inner, next(i for i in inner.values() if i.root), scopes)
    if instruction.op == "tuple":
        return sum(_written(scope, scope[name], scopes) for name in operands_of(instruction))
    if instruction.op in _SAME_BYTES and operands_of(instruction)[0] in scope:
        return _written(scope, scope[operands_of(instruction)[0]], scopes)
    if instruction.op in ("dynamic-update-slice", "scatter") and _in_place(scope, instruction):
        new = 1 if instruction.op == "dynamic-update-slice" else -1
        return _size(scope.get(operands_of(instruction)[new]))
    return _size(instruction)


def _in_place(scope: Scope, update: Instruction) -> bool:
    """Whether what is updated comes from outside of the fusion, not from the fusion itself."""
    found = scope[operands_of(update)[0]]
    while found.op in _SAME_BYTES:
        found = scope[operands_of(found)[0]]
    return found.op in ("parameter", "get-tuple-element", "while", "copy")


def _flops(scope: Scope, instruction: Instruction, scopes: dict[str, Scope]) -> int:
    if instruction.op == "dot":
        left = dims_of(scope[operands_of(instruction)[0]].type)
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)[1]
        depth = math.prod(left[int(dim)] for dim in contracted.split(",") if dim)
        return 2 * depth * math.prod(dims_of(instruction.type))
    inner = (scopes[name] for name in instruction.called)
    return sum(_flops(found, i, scopes) for found in inner for i in found.values())


def _path(instruction: Instruction, computations: Computations) -> str:
    """Its own op_name, or the last one inside it: some fusions have lost theirs."""
    inside = [i for name in instruction.called for i in reversed(computations[name])]
    for found in [instruction, *inside]:
        if path := re.search(r'metadata=\{op_name="([^"]*)"', found.rest):
            return path[1]
    return ""
