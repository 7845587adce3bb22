"""The row rule: a source as rows of `sequence_length` + 1 tokens, shuffled anew every epoch.

Row r of a source is tokens [r*S, r*S + S + 1) of the concatenation of its shards in the order of
the manifest: stride S, one token shared with the next row, the tail that fills no row dropped.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from stablelm_jax.data.manifest import Source, open_shard
from stablelm_jax.data.shard_cache import RemoteShard
from stablelm_jax.data.shards import Shard

# Up to this many rows an epoch's order is a table (65,536 rows sort in 5 ms), beyond it is grain's
# index shuffle, which needs no table but takes 0.05 ms an index for 1,000 rows and 4 ms for 10.
MAX_TABLE = 65_536


class Row(NamedTuple):
    """`tokens` int32 [S + 1], the index of the source they come from, the row's number there."""

    tokens: np.ndarray
    source: int
    number: int


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


class SourceRows(grain.MapDataset[Row]):
    """The rows of a source's train split in order, over and over; `stream` is what they cut.

    A dataset of its own and not a `MapDataset.source`, whose metrics cost 20 us a row, more than
    everything else together.
    """

    def __init__(self, source: Source, sequence_length: int, source_index: int = 0):
        super().__init__()
        self.stream = token_stream(source, "train")
        self.length, self._index = sequence_length, source_index
        self._rows = (self.stream.num_tokens - 1) // sequence_length
        if self._rows < 1:
            raise ValueError(
                f"{source.directory}: {self.stream.num_tokens} train tokens do not fill one row of"
                f" {sequence_length} + 1; use a shorter data.sequence_length or more data"
            )

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        number = index % self._rows
        ((start, places),) = self.extents(number)
        return Row(self.stream.read(start, start + places + 1), self._index, number)

    def extents(self, row: int) -> list[tuple[int, int]]:
        """First token and number of places of each part of a row: it is a single one."""
        return [(row * self.length, self.length)]


def source_seed(seed: int, name: str) -> int:
    """Seed of a source's shuffle, in [0, 2**32): a hash, so no two sources follow each other."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "little")


def shuffled(dataset: grain.MapDataset, seed: int) -> grain.MapDataset:
    """A dataset's elements without end, in another order every epoch."""
    return TableShuffle(dataset, seed) if len(dataset) <= MAX_TABLE else dataset.shuffle(seed)


class TableShuffle(grain.MapDataset[Row]):
    """Shuffles a small dataset anew every epoch, by a table of the epoch's order."""

    def __init__(self, parent: grain.MapDataset, seed: int):
        super().__init__(parent)
        order = functools.partial(epoch_order, len(parent), seed)
        # Two epochs, as a batch may straddle them. The cache lives and dies with the dataset.
        self._order = functools.lru_cache(maxsize=2)(order)

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, len(self._parent))
        return self._parent[self._order(epoch).item(place)]


def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """int32 [rows], the order of an epoch: rows sorted by Philox words keyed by seed and epoch.

    The words of a bit generator and a stable sort are the same on every machine and in every
    version of NumPy, which NumPy does not promise of its own `permutation`.
    """
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(rows)
    return np.argsort(words, kind="stable").astype(np.int32)
