"""Do the devices that should hold the same bits hold the same bits?

A chip that computes wrongly now and then does not crash: its copy of the weights drifts from the
others'. What is split over every axis has no second copy and cannot be compared: with ZeRO-1 and
one group of devices that is nearly all, so the check is for `parallel.replica` above 1, for
`parallel.zero1=False`, and for what ZeRO-1 leaves whole.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from stablelm_jax.checkpoint.checksum import flatten, leaf_checksum


def make_replica_check(abstract: Any, mesh: Mesh) -> Any:
    """Jitted f(tree) -> {leaf name: uint32 [devices]}: the checksum of each device's own part.

    `abstract`: a nested dict of `ShapeDtypeStruct`s with their shardings on `mesh`. Devices are in
    the order of the mesh.
    """

    def gathered_sums(tree):
        sums = jnp.stack([leaf_checksum(leaf) for leaf in flatten(tree).values()])
        by_device = jax.lax.all_gather(sums, mesh.axis_names).reshape(mesh.size, -1)
        return dict(zip(flatten(tree), by_device.T))

    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, abstract)
    placed = dict(mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec())
    return jax.jit(jax.shard_map(gathered_sums, **placed, check_vma=False))


def diverged(sums: Any, abstract: Any, mesh: Mesh) -> dict[str, list[int]]:
    """{leaf name: numbers of the devices whose bits are not those of most others}.

    Where two copies disagree nobody knows which is right: both are named.
    """
    found = {}
    for name, leaf in flatten(abstract).items():
        places = leaf.sharding.devices_indices_map(leaf.shape)
        copies = defaultdict(list)  # part of the leaf -> [(device's number, checksum)]
        for number, device in enumerate(mesh.devices.flat):
            copies[str(places[device])].append((number, int(sums[name][number])))
        odd = []
        for held in copies.values():
            (usual, count), *others = Counter(value for _, value in held).most_common()
            known = not others or 2 * count > len(held)
            odd += [number for number, value in held if value != usual or not known]
        if odd:
            found[name] = sorted(odd)
    return found
