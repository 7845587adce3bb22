"""One table from logical axes to mesh axes, and the shardings that follow from it.

ZeRO-1 as published: float32 master weights and Adam moments are split over `data`; the copy in
the compute type is gathered once a step. Nothing but the batch is split over `replica`. A "spec"
below is a `PartitionSpec`, one for each leaf of a parameter tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stablelm_jax.model.lora import map_kernels
from stablelm_jax.model.parameters import ParameterSpec, nest
from stablelm_jax.parallel.mesh import BATCH_AXES

# Tensor parallelism splits heads, feed-forward and vocabulary over `model`; the rest stays whole.
LOGICAL_TO_MESH = {
    "batch": BATCH_AXES,
    "vocab": "model",
    "heads": "model",
    "kv_heads": "model",
    "feed_forward": "model",
    "width": None,
    "head_size": None,
    "sequence": None,
    "layers": None,
    "rank": None,
}


def mesh_axes(logical_axes: Iterable[str]) -> PartitionSpec:
    """The mesh axes of an array whose dims have these logical names."""
    return PartitionSpec(*(LOGICAL_TO_MESH[axis] for axis in logical_axes))


def master_spec(row: ParameterSpec, sizes: Mapping[str, int], zero1: bool) -> PartitionSpec:
    """Spec of a float32 master weight and its moments on a mesh of these sizes.

    With ZeRO-1 `data` splits the largest dim that is whole and that it divides, if there is one. A
    stacked parameter keeps its layers together: with FSDP they are gathered one by one.
    """
    entries = list(mesh_axes(row.axes))
    dims = range(int(row.stacked), len(row.shape))
    whole = [d for d in dims if entries[d] is None and row.shape[d] % sizes["data"] == 0]
    if zero1 and sizes["data"] > 1 and whole:
        entries[max(whole, key=lambda d: row.shape[d])] = "data"
    return PartitionSpec(*entries)


def data_dim(spec: PartitionSpec) -> int | None:
    """The dim that `spec` splits over `data`, or None."""
    return next((d for d, axis in enumerate(spec) if axis == "data"), None)


def parameter_specs(table: Iterable[ParameterSpec]) -> dict[str, Any]:
    """Specs of the compute copy: split over `model` only."""
    return nest({row.name: mesh_axes(row.axes) for row in table})


def master_specs(table: Iterable[ParameterSpec], mesh: Mesh, zero1: bool) -> dict[str, Any]:
    """`master_spec` of every parameter."""
    return nest({row.name: master_spec(row, mesh.shape, zero1) for row in table})


def named(mesh: Mesh, specs: Any) -> Any:
    """A tree of specs as a tree of `NamedSharding`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def gathered(params: Any, dtype: Any, shardings: Any) -> Any:
    """The copy in the compute type, gathered in that type, inside jit: ZeRO-1's one gather."""

    def gather(p, place):
        # Without it XLA may cast stacked layers behind their gather: twice the bytes are sent.
        cast = jax.lax.optimization_barrier(p.astype(dtype))
        return jax.lax.with_sharding_constraint(cast, place)

    return map_kernels(gather, params, shardings)


def layers_apart(table: Iterable[ParameterSpec], mesh: Mesh, zero1: bool) -> Callable:
    """What calls f({name: stacked array}) where no layer is split, inside jit.

    The devices of a group each take whole layers, some of them zeros; the results lie as masters.
    """
    # One axis moves at a time: two at once XLA does not know how to send.
    ways = (
        {row.name: master_spec(row, mesh.shape, zero1) for row in table},
        {row.name: PartitionSpec("data", *mesh_axes(row.axes)[1:]) for row in table},
        {row.name: PartitionSpec(("data", "model")) for row in table},
    )
    parts = mesh.shape["data"] * mesh.shape["model"]

    def put(arrays: dict[str, jax.Array], way: dict[str, PartitionSpec]) -> dict[str, jax.Array]:
        places = named(mesh, {name: way[name] for name in arrays})
        return jax.lax.with_sharding_constraint(arrays, places)

    def call(function: Callable, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        # Layers that do not divide XLA would pad once they are apart, and send again for it.
        padded = {
            name: jnp.pad(x, [(0, -len(x) % parts)] + [(0, 0)] * (x.ndim - 1))
            for name, x in arrays.items()
        }
        for way in ways:
            padded = put(padded, way)
        # Said of the results too, else XLA sends back what they are the sum of, term by term.
        found = function(padded)
        for way in reversed(ways):
            found = put(found, way)
        return {name: x[: len(arrays[name])] for name, x in found.items()}

    return call


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over `replica` and `data`."""
    return NamedSharding(mesh, mesh_axes(["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def map_rows(function: Callable, mesh: Mesh, out_specs: Any) -> Callable:
    """f(params, batch) in which each device sees whole parameters and its own rows of the batch.

    `model` is left to the compiler. `out_specs` says over which axes the results are split.
    """
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(PartitionSpec(), mesh_axes(["batch"])),
        out_specs=out_specs,
        axis_names=set(BATCH_AXES),
        check_vma=False,
    )


def batch_parts(mesh: Mesh) -> int:
    """How many parts a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def process_share(mesh: Mesh, rows: int) -> tuple[int, int]:
    """(index, count): this process feeds the index-th of `count` equal parts of a batch.

    Processes that a `model` axis ties together feed the same part.

    Raises:
      ValueError: the devices of a process do not lie together along `data`.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    spans = sorted({index[0].indices(rows)[:2] for index in places})
    start, stop = spans[0][0], spans[-1][1]
    if sum(b - a for a, b in spans) != stop - start or rows % (stop - start):
        raise ValueError(
            f"the devices of process {jax.process_index()} lie apart along the rows of a batch, at "
            f"rows {spans}: use another parallel.model"
        )
    return start // (stop - start), rows // (stop - start)


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows as global arrays, split as `batch_sharding` (dim 0 of every entry)."""
    sharding = batch_sharding(mesh)
    parts = batch_parts(mesh) // batch_parts(mesh.local_mesh)
    with jax.transfer_guard("allow"):  # meant, though jax does not count it as explicit
        return {
            name: jax.make_array_from_process_local_data(
                sharding, value, (value.shape[0] * parts, *value.shape[1:])
            )
            for name, value in batch.items()
        }
