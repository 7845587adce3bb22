"""The row rule: a source as rows of `sequence_length` + 1 tokens, shuffled anew every epoch.

Row r of a source is tokens [r*S, r*S + S + 1) of the concatenation of its shards in the order of
the manifest: stride S, one token shared with the next row, the tail that fills no row dropped.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence

import grain
import numpy as np

from stablelm_jax.data.manifest import Source, open_shard
from stablelm_jax.data.shard_cache import RemoteShard
from stablelm_jax.data.shards import Shard

# Up to this many rows an epoch's order is a table (65,536 rows sort in 5 ms), beyond it is grain's
# index shuffle, which needs no table but takes 0.05 ms an index for 1,000 rows and 4 ms for 10.
MAX_TABLE = 65_536


class TokenStream:
    """The concatenation of some shards, read by position; `num_tokens` counts all of them."""

    def __init__(self, shards: Sequence[Shard | RemoteShard]):
        self._shards = shards
        self._starts = [0, *itertools.accumulate(shard.num_tokens for shard in shards)]
        self.num_tokens = self._starts[-1]

    def document_offsets(self) -> np.ndarray:
        """int64 [documents + 1]: document d is the tokens from offsets[d] to offsets[d + 1]."""
        parts = [s.document_offsets[:-1] + start for s, start in zip(self._shards, self._starts)]
        return np.concatenate([*parts, [self.num_tokens]])

    def locate(self, position: int) -> tuple[Shard | RemoteShard, int]:
        """The shard that holds the token at `position`, and its place there."""
        number = bisect.bisect_right(self._starts, position) - 1
        return self._shards[number], position - self._starts[number]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as a fresh int32 array; a read may cross shards."""
        parts = []
        while start < stop:
            shard, first = self.locate(start)
            parts.append(shard.read(first, min(first + stop - start, shard.num_tokens)))
            start += len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def token_stream(source: Source, split: str) -> TokenStream:
    """The tokens of a source's `train` or `held_out` split; ShardError if a shard is not whole."""
    infos = getattr(source.manifest, split).shards
    return TokenStream([open_shard(source.directory / info.file, info) for info in infos])


class SourceRows:
    """The rows of a source's train split.

    Attributes:
      source_id: what a batch calls the source.
      length: tokens of a row, the one shared with the next not counted.
      stream: what the rows are cut from.
      order: f(n): which row is drawn as the n-th, see `row_order`.
    """

    def __init__(self, source: Source, sequence_length: int, seed: int, source_id: int = 0):
        """`seed`: of the run. ValueError: no row is filled; ShardError: a shard is not whole."""
        self.source_id, self.length = source_id, sequence_length
        self.stream = token_stream(source, "train")
        if len(self) < 1:
            raise ValueError(
                f"{source.directory}: {self.stream.num_tokens} train tokens do not fill one row of"
                f" {sequence_length} + 1; use a shorter data.sequence_length or more data"
            )
        self.order = row_order(len(self), source_seed(seed, source.name))

    def __len__(self) -> int:
        return (self.stream.num_tokens - 1) // self.length

    def tokens(self, row: int) -> np.ndarray:
        """int32 [S + 1]."""
        return self.stream.read(row * self.length, (row + 1) * self.length + 1)

    def extents(self, row: int) -> list[tuple[int, int]]:
        """First token and number of places of each part of a row: it is a single one."""
        return [(row * self.length, self.length)]


def source_seed(seed: int, name: str) -> int:
    """Seed of a source's shuffle, in [0, 2**32): a hash, so no two sources follow each other."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "little")


def row_order(rows: int, seed: int) -> Callable[[int], int]:
    """f(n): the row that is drawn as the n-th: all of them every epoch, each in another order."""
    if rows > MAX_TABLE:
        shuffled = grain.MapDataset.range(rows).shuffle(seed)
        return lambda n: int(shuffled[n])
    # Two epochs, as a batch may straddle them.
    order = functools.lru_cache(maxsize=2)(functools.partial(epoch_order, rows, seed))
    return lambda n: order(n // rows).item(n % rows)


def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """int32 [rows], the order of an epoch: rows sorted by Philox words keyed by seed and epoch.

    The words of a bit generator and a stable sort are the same on every machine and in every
    version of NumPy, which NumPy does not promise of its own `permutation`.
    """
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(rows)
    return np.argsort(words, kind="stable").astype(np.int32)
