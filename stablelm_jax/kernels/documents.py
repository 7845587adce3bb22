"""Where documents begin and end in rows, and which tiles of attention that leaves.

B batch, T queries or keys of a row; of one tile, Q queries and S keys.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Tile:
    """Queries and keys that a kernel handles at a time."""

    queries: int
    keys: int


def document_spans(segment_ids_BT: jax.Array, padding: int = 0) -> tuple[jax.Array, jax.Array]:
    """For each token the first index of its document and the index after its last: int32 [B, T].

    Both get `padding` more tokens, the row's last document, which no token before it can see.
    """
    changes = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    positions = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    is_first = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    is_last = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
    start_BT = jax.lax.cummax(jnp.where(is_first, positions, 0), axis=1)
    end_BT = jax.lax.cummin(jnp.where(is_last, positions + 1, positions.size), axis=1, reverse=True)
    more, length = ((0, 0), (0, padding)), positions.size
    start_BT = jnp.pad(start_BT, more, constant_values=length)
    return start_BT, jnp.pad(end_BT, more, constant_values=length + padding)


def query_block_bounds(start_BT: jax.Array, tile: Tile) -> jax.Array:
    """Key blocks that each block of queries visits: int32 [B, T / queries, 4].

    The four are borders b0 <= b1 <= b2 <= b3: blocks b0..b1 and b2..b3 need a mask, in b1..b2 every
    query may see every key. Block b0 holds the start of the first query's document, b3 comes after
    the diagonal.
    """
    first = jnp.arange(0, start_BT.shape[1], tile.queries, dtype=jnp.int32)
    last = first + tile.queries - 1
    begin = start_BT[:, first] // tile.keys
    end = jnp.broadcast_to(last // tile.keys + 1, begin.shape)
    whole_end = jnp.maximum((first + 1) // tile.keys, begin)
    whole_begin = jnp.clip(_ceil_div(start_BT[:, last], tile.keys), begin, whole_end)
    return jnp.stack([begin, whole_begin, whole_end, end], -1)


def key_block_bounds(end_BT: jax.Array, tile: Tile) -> jax.Array:
    """Query blocks that each block of keys visits, as in `query_block_bounds`: [B, T / keys, 4].

    From the diagonal to the last query of the last key's document.
    """
    first = jnp.arange(0, end_BT.shape[1], tile.keys, dtype=jnp.int32)
    last = first + tile.keys - 1
    end = _ceil_div(end_BT[:, last], tile.queries)
    begin = jnp.broadcast_to(first // tile.queries, end.shape)
    whole_begin = jnp.broadcast_to(_ceil_div(last, tile.queries), end.shape)
    whole_end = jnp.maximum(end_BT[:, first] // tile.queries, whole_begin)
    return jnp.stack([begin, whole_begin, whole_end, end], -1)


def _ceil_div(a, b):
    return -(-a // b)
