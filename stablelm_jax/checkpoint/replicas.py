"""Do the devices that should hold the same bits hold the same bits?

A chip that computes wrongly now and then does not crash: its copy of the weights drifts from the
others'. What is split over every axis has no second copy and cannot be compared: with ZeRO-1 and
one group of devices that is nearly all, so the check is for `parallel.replica` above 1, for
`parallel.zero1=False`, and for what ZeRO-1 leaves whole.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from stablelm_jax.checkpoint.checksum import flatten, leaf_checksum


def make_replica_check(abstract: Any, mesh: Mesh) -> Any:
    """Jitted f(tree) -> {leaf name: uint32 [devices]}: the checksum of each device's own part.

    `abstract`: a nested dict of `ShapeDtypeStruct`s with their shardings on `mesh`. Devices are in
    the order of the mesh.
    """
    leaves = flatten(abstract)

    def own_sums(tree):
        sums = jnp.stack([leaf_checksum(leaf) for leaf in flatten(tree).values()])
        return jax.lax.all_gather(sums, mesh.axis_names)

    gathered = jax.shard_map(
        own_sums,
        mesh=mesh,
        in_specs=(jax.tree.map(lambda leaf: leaf.sharding.spec, abstract),),
        out_specs=PartitionSpec(),
        check_vma=False,
    )

    def check(tree):
        sums = gathered(tree).reshape(math.prod(mesh.shape.values()), len(leaves))
        return dict(zip(leaves, sums.T))

    return jax.jit(check)


def diverged(sums: Any, abstract: Any, mesh: Mesh) -> dict[str, list[int]]:
    """{leaf name: numbers of the devices whose bits are not those of most others}.

    Where two copies disagree nobody knows which is right: both are named.
    """
    found = {}
    shape = tuple(mesh.shape.values())
    numbers = np.arange(math.prod(shape)).reshape(shape)
    for name, leaf in flatten(abstract).items():
        split = {axis for entry in leaf.sharding.spec for axis in _axes(entry)}
        own = [axis in split for axis in mesh.axis_names]
        order = [i for i, mine in enumerate(own) if mine] + [
            i for i, mine in enumerate(own) if not mine
        ]
        parts = math.prod(shape[i] for i, mine in enumerate(own) if mine)
        by_part = np.asarray(sums[name]).reshape(shape).transpose(order).reshape(parts, -1)
        places = numbers.transpose(order).reshape(parts, -1)
        odd = [place for copies, where in zip(by_part, places) for place in _odd(copies, where)]
        if odd:
            found[name] = sorted(odd)
    return found


def _axes(entry: Any) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def _odd(copies: np.ndarray, where: np.ndarray) -> list[int]:
    values, counts = np.unique(copies, return_counts=True)
    if len(values) == 1:
        return []
    if 2 * counts.max() <= len(copies):
        return where.tolist()
    return where[copies != values[counts.argmax()]].tolist()
