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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stablelm_jax.model.parameters import nest
from stablelm_jax.parallel.mesh import BATCH_AXES

# Tensor parallelism splits heads, feed-forward and vocabulary over `model`; the rest stays whole.
LOGICAL_TO_MESH: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "vocab": "model",
    "heads": "model",
    "kv_heads": "model",
    "feed_forward": "model",
    "width": None,
    "head_size": None,
    "sequence": None,
    "layers": None,
}


def mesh_axes(logical_axes: Iterable[str | None]) -> PartitionSpec:
    """The mesh axes of an array whose dims have these logical names (None: not split)."""
    return PartitionSpec(*(None if a is None else LOGICAL_TO_MESH[a] for a in logical_axes))


def zero_spec(
    spec: PartitionSpec, shape: tuple[int, ...], sizes: Mapping[str, int], *, stacked: bool = False
) -> PartitionSpec:
    """`spec` with `data` added to the largest whole dim that it divides; unchanged if none.

    `sizes`: devices along each mesh axis. A stacked parameter keeps its layers together: with FSDP
    they are gathered one by one.
    """
    size = sizes["data"]
    entries = list(spec) + [None] * (len(shape) - len(spec))
    dims = range(int(stacked), len(shape))
    whole = [d for d in dims if entries[d] is None and shape[d] % size == 0]
    if size == 1 or not whole:
        return PartitionSpec(*entries)
    entries[max(whole, key=lambda d: shape[d])] = "data"
    return PartitionSpec(*entries)


def data_dim(spec: PartitionSpec) -> int | None:
    """The dim that `spec` splits over `data`, or None."""
    return next((d for d, axis in enumerate(spec) if axis == "data"), None)


def parameter_specs(table: Iterable[Any]) -> dict[str, Any]:
    """Specs of the compute copy: split over `model` only. `table`: model.parameters' rows."""
    return nest({row.name: mesh_axes(row.axes) for row in table})


def master_specs(table: Iterable[Any], mesh: Mesh, zero1: bool) -> dict[str, Any]:
    """Specs of the float32 master weights and of each moment: with ZeRO-1 over `data` too."""
    specs = {row.name: mesh_axes(row.axes) for row in table}
    if zero1:
        specs = {
            row.name: zero_spec(specs[row.name], row.shape, mesh.shape, stacked=row.stacked)
            for row in table
        }
    return nest(specs)


def named(mesh: Mesh, specs: Any) -> Any:
    """A tree of specs as a tree of `NamedSharding`."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def gathered(params: Any, dtype: Any, shardings: Any) -> Any:
    """The copy in the compute type, gathered in that type, inside jit: ZeRO-1's one gather.

    Without the barrier and with one microbatch, XLA moves the cast of the stacked layers behind
    their gather: float32 goes over the wire, twice the bytes.
    """

    def gather(p, place):
        cast = jax.lax.optimization_barrier(p.astype(dtype))
        return jax.lax.with_sharding_constraint(cast, place)

    return jax.tree.map(gather, params, shardings)


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
