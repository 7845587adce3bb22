"""A checksum for every leaf of a state, computed where the leaf lives.

Storage layers do not notice a flipped bit in a data file. Each leaf therefore carries the sum,
modulo 2^32, of its elements' bits times an odd weight that depends on the element's position: an
odd weight makes every single flipped bit show, the position makes swapped elements show. Integer
sums do not depend on order, hence not on the sharding.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from stablelm_jax.model.parameters import flatten

_BLOCK = 2**13  # elements: with their weights they stay in a core's first cache


def checksums(tree: Any) -> dict[str, int]:
    """{leaf name: uint32 checksum} of a nested dict of arrays; waits for the devices.

    Of arrays that lie on the devices of several processes, every process calls it alike.
    """
    return fetch_checksums(start_checksums(tree))


def start_checksums(tree: Any) -> dict[str, jax.Array]:
    """What `fetch_checksums` makes the checksums of; does not wait for the devices.

    The programs read the leaves before any later one, to which they may be donated.
    """
    # The small ones first, which are soon over: a CPU's client takes 32 programs before it waits.
    leaves = sorted(flatten(tree).items(), key=lambda item: item[1].size)
    return gathered({name: shares(leaf) for name, leaf in leaves})


def shares(leaf: jax.Array) -> jax.Array:
    """uint32 [devices]: what each has of the leaf's checksum; they need nothing of each other."""
    return _shares(leaf, leaf.sharding)


def gathered(by_leaf: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The `shares` of leaves, now also those of other processes; does not wait for the devices."""
    spread = {name: x for name, x in by_leaf.items() if not x.is_fully_addressable}
    whole = {name: NamedSharding(x.sharding.mesh, PartitionSpec()) for name, x in spread.items()}
    return by_leaf | (jax.jit(lambda x: x, out_shardings=whole)(spread) if spread else {})


def fetch_checksums(by_leaf: dict[str, jax.Array]) -> dict[str, int]:
    """{leaf name: uint32 checksum} of what was `gathered`; waits for the devices."""
    found = jax.device_get(by_leaf)
    return {name: int(np.sum(parts, dtype=np.uint32)) for name, parts in found.items()}


def leaf_checksum(x: jax.Array, start: Any = 0, whole: tuple[int, ...] = ()) -> jax.Array:
    """uint32 scalar of one array, inside jit.

    `start`: the flat position of its first element in the array of the shape `whole` (by default
    its own) that it is a part of.
    """
    start, whole = jnp.asarray(start, jnp.uint32), whole or x.shape
    at_once = functools.partial(_at_once, whole=whole)
    if x.shape[1:] != whole[1:]:
        return at_once(x, start)
    # Whole rows: the elements follow one another.
    return jax.lax.platform_dependent(x, start, cpu=_blockwise, default=at_once)


def _at_once(x: jax.Array, start: jax.Array, whole: tuple[int, ...]) -> jax.Array:
    return jnp.sum(_bits(x) * _weights(_positions(x.shape, whole) + start), dtype=jnp.uint32)


def _blockwise(x: jax.Array, start: jax.Array) -> jax.Array:
    """The same sum. XLA:CPU would write all products to memory before it sums them."""
    block = math.gcd(x.size, _BLOCK)
    if not x.size or block < 2**8:  # of an odd size many short blocks would be slower
        return _at_once(x, start, x.shape)
    blocks = x.reshape(-1, block)

    def add(i, sums):
        first = start + i.astype(jnp.uint32) * jnp.uint32(block)
        return sums + _bits(blocks[i]) * _weights(jnp.arange(block, dtype=jnp.uint32) + first)

    zeros = jnp.zeros(block, jnp.uint32)
    return jnp.sum(jax.lax.fori_loop(0, len(blocks), add, zeros), dtype=jnp.uint32)


@functools.partial(jax.jit, static_argnames="sharding")
def _shares(leaf: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    # Of equal parts one device has it all.
    if sharding.num_devices == 1:
        return leaf_checksum(leaf)[None]
    mesh, spec = sharding.mesh, sharding.spec
    split = {d: axes for d, axes in enumerate(spec) if axes}
    split_by = [name for axes in split.values() for name in np.atleast_1d(axes)]
    copied_by = tuple(name for name in mesh.axis_names if name not in split_by)

    def share(part):
        start = jnp.uint32(0)
        for dim, axes in split.items():
            span = part.shape[dim] * math.prod(leaf.shape[dim + 1 :])
            start += jax.lax.axis_index(axes).astype(jnp.uint32) * jnp.uint32(span % 2**32)
        found = leaf_checksum(part, start, leaf.shape)
        counts = jax.lax.axis_index(copied_by) == 0 if copied_by else True
        return jnp.where(counts, found, jnp.uint32(0))[None]

    places = dict(in_specs=(spec,), out_specs=PartitionSpec(mesh.axis_names))
    return jax.shard_map(share, mesh=mesh, **places, check_vma=False)(leaf)


def _bits(x: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _positions(shape: tuple[int, ...], whole: tuple[int, ...]) -> jax.Array:
    """The flat position of each element, modulo 2^32, in an array of the shape `whole`."""
    position = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for dim in reversed(range(len(shape))):
        position += jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * jnp.uint32(stride % 2**32)
        stride *= whole[dim]
    return position


def _weights(position: jax.Array) -> jax.Array:
    """Odd pseudo-random uint32 weights."""
    # The finaliser of MurmurHash3 (Appleby, public domain) without its last shift.
    mixed = (position ^ (position >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return mixed | jnp.uint32(1)
