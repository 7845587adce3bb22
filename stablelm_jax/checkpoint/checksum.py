"""A checksum for every leaf of a state, computed where the leaf lives.

Storage layers do not notice a flipped bit in a data file. Each leaf therefore carries the sum,
modulo 2^32, of its elements' bits times an odd weight that depends on the element's position: an
odd weight makes every single flipped bit show, the position makes swapped elements show. Integer
sums do not depend on order, hence not on the sharding.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stablelm_jax.model.parameters import flatten

_PART = 2**22  # elements


def checksums(tree: Any) -> dict[str, int]:
    """{leaf name: uint32 checksum} of a nested dict of arrays; waits for the devices."""
    # One program a leaf: XLA:CPU holds the products of all leaves of a program at once. And one
    # after the other: of many that are under way together, its devices may wait for one another.
    return {name: int(jax.device_get(_checksum(leaf))) for name, leaf in flatten(tree).items()}


def host_checksum(x: np.ndarray) -> int:
    """As `leaf_checksum`, of an array in the host's memory: it is copied a part at a time."""
    flat = x.reshape(-1)
    starts = range(0, flat.size, _PART)
    parts = (_checksum(flat[start : start + _PART], np.uint32(start % 2**32)) for start in starts)
    return sum(map(int, parts)) % 2**32


def leaf_checksum(x: jax.Array, start: Any = 0) -> jax.Array:
    """uint32 scalar of one array, inside jit; its elements are those from position `start` on."""
    return jnp.sum(_bits(x) * _weights(_positions(x.shape) + start), dtype=jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _positions(shape: tuple[int, ...]) -> jax.Array:
    """The flat position of each element, modulo 2^32."""
    position = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for dim in reversed(range(len(shape))):
        position += jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * jnp.uint32(stride % 2**32)
        stride *= shape[dim]
    return position


def _weights(position: jax.Array) -> jax.Array:
    """Odd pseudo-random uint32 weights."""
    # The finaliser of MurmurHash3 (Appleby, public domain) without its last shift.
    mixed = (position ^ (position >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return mixed | jnp.uint32(1)


_checksum = jax.jit(leaf_checksum)
