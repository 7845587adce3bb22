"""A checksum for every leaf of a state, computed where the leaf lives.

Storage layers do not notice a flipped bit in a data file. Each leaf therefore carries the sum,
modulo 2^32, of its elements' bits times an odd weight that depends on the element's position: an
odd weight makes every single flipped bit show, the position makes swapped elements show. Integer
sums do not depend on order, hence not on the sharding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def checksums(tree: Any) -> dict[str, int]:
    """{leaf name: uint32 checksum} of a nested dict of arrays; waits for the devices."""
    # One program a leaf: XLA:CPU holds the products of all leaves of a program at once.
    sums = {name: _checksum(leaf) for name, leaf in flatten(tree).items()}
    return {name: int(value) for name, value in jax.device_get(sums).items()}


def flatten(tree: Any) -> dict[str, Any]:
    """{'a/b': leaf} of a nested dict."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def differing(expected: Mapping[str, int], actual: Mapping[str, int]) -> list[str]:
    """Names whose checksums differ, or which only one side has."""
    names = expected.keys() | actual.keys()
    return sorted(name for name in names if expected.get(name) != actual.get(name))


def leaf_checksum(x: jax.Array) -> jax.Array:
    """uint32 scalar of one array, inside jit."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    return jnp.sum(bits * _weights(x.shape), dtype=jnp.uint32)


def _weights(shape: tuple[int, ...]) -> jax.Array:
    """Odd pseudo-random uint32 weights of the flat positions (modulo 2^32) of `shape`."""
    position = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for dim in reversed(range(len(shape))):
        position += jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * jnp.uint32(stride % 2**32)
        stride *= shape[dim]
    # The finaliser of MurmurHash3 (Appleby, public domain) without its last shift.
    mixed = (position ^ (position >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return mixed | jnp.uint32(1)


_checksum = jax.jit(leaf_checksum)
