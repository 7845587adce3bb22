"""Packing: whole items laid into rows, so that few are cut and few places stay empty.

An item is a conversation, a preference pair, or a document of text; of one that is longer than a
row, a piece. A document of n tokens takes n - 1 places: inputs t[:-1], targets t[1:]. A packing
follows from lengths and a seed alone; it is made anew at every start and never stored.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from stablelm_jax.data.manifest import Source
from stablelm_jax.data.rows import row_order, source_seed, token_stream
from stablelm_jax.data.shards import read_spans

if TYPE_CHECKING:
    from stablelm_jax.data.batches import BatchSpec

PackedRow = tuple["PackedRows", int | None]  # a row by its number; None: an empty one


def best_fit(lengths: np.ndarray, capacity: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Items row after row, int32 [N], and where each row begins among them, int64 [rows + 1].

    Best fit decreasing: the longest item first, each into the fullest row that has room for it. At
    most 11/9 of the fewest rows possible, and one more (Johnson et al., SIAM J. Comput. 3, 1974).
    The seed orders items of one length, and the rows, so that the first rows are a fair sample.

    Items of one length are placed together: once the fullest row with room for one has taken it, no
    other is fuller and has room, so it takes as many as it can. A million items take a second.
    `lengths` [N] lie in [1, capacity].
    """
    words = np.random.Philox(key=np.array([seed, 0], np.uint64)).random_raw(2 * len(lengths))
    order = np.lexsort((words[: len(lengths)], -lengths))
    row_of_item = np.empty(len(lengths), np.int32)
    rows = collections.defaultdict(list)  # by the room that they have left
    rooms = count = first = 0  # bit r of `rooms` is set where there are rows with a room of r
    sizes, numbers = np.unique(lengths, return_counts=True)
    for length, left in zip(sizes[::-1].tolist(), numbers[::-1].tolist()):
        while left:
            fitting = rooms >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            each = room // length
            wanted = -(-left // each)
            if not fitting:
                rows[room] = list(range(count, count + wanted))
                count += wanted
            taken = rows[room][-wanted:]
            del rows[room][-wanted:]
            placed = min(left, len(taken) * each)
            row_of_item[order[first : first + placed]] = np.repeat(taken, each)[:placed]
            full, rest = divmod(placed, each)
            rows[room - each * length] += taken[:full]
            rows[room - rest * length] += taken[full:]
            for changed in (room, room - each * length, room - rest * length):
                rooms = rooms & ~(1 << changed) | bool(rows[changed]) << changed
            first, left = first + placed, left - placed
    row_of_item = np.argsort(words[len(lengths) :][:count]).astype(np.int32)[row_of_item]
    starts = np.cumsum(np.bincount(row_of_item, minlength=count))
    return np.argsort(row_of_item, kind="stable").astype(np.int32), np.append(0, starts)


class PackedRows:
    """The rows of one split, the same in every epoch; the seed has no part in those held out.

    Attributes:
      source_id: what a batch calls the source.
      lengths: int32 [items], places that each takes.
      trained: how many targets count in an epoch.
      most_pairs: the most preference pairs that a row holds.
      order: f(n): which row is drawn as the n-th, see `row_order`.
    """

    def __init__(self, source: Source, split: str, spec: BatchSpec, source_id: int):
        """Packs. ValueError: items that no row holds; ShardError: a shard is missing or damaged."""
        self.source_id, self.length = source_id, spec.sequence_length
        self.stream, kind = token_stream(source, split), source.manifest.kind
        self._sides = 2 if kind == "pairs" else 1  # segments of an item
        offsets = self.stream.document_offsets()
        self._firsts, self._places = offsets[:-1], np.maximum(np.diff(offsets) - 1, 0)
        if kind == "text":
            self._firsts, self._places = _cut(self._firsts, self._places, self.length)
        self.lengths = self._places.reshape(-1, self._sides).sum(axis=1, dtype=np.int32)
        if too_long := int((self.lengths > self.length).sum()):
            raise ValueError(
                f"{source.directory}: {too_long} of {len(self.lengths)} {split} {kind} fit into no"
                f" row of {self.length} tokens, the longest takes {self.lengths.max()}; prepare the"
                f" source again with --max-tokens {self.length}, or raise data.sequence_length"
            )
        self.trained = int(self.lengths.sum(dtype=np.int64))
        self._edges = np.array([0, self.stream.num_tokens])
        if kind != "text" and spec.loss_on == "answers":
            self._edges = _trained_edges(source, split, offsets)
            firsts, lasts = self._edges[::2], self._edges[1::2]  # what opens a document: no target
            self.trained = int((lasts - firsts).sum() - np.isin(firsts, offsets).sum())
        count = len(self.lengths)
        self._items, self._starts = np.arange(count), np.arange(count + 1)
        if spec.packing == "best_fit":
            seed = source_seed(spec.seed, f"{source.name}/packing") if split == "train" else 0
            self._items, self._starts = best_fit(np.maximum(self.lengths, 1), self.length, seed)
        self.most_pairs = int(np.diff(self._starts).max(initial=0)) if kind == "pairs" else 0
        self.order = row_order(len(self), source_seed(spec.seed, source.name))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def items(self, row: int) -> np.ndarray:
        """The numbers of a row's items; of pairs, as `pair_ids` has them."""
        return self._items[self._starts[row] : self._starts[row + 1]]

    def segments(self, row: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Of each segment of a row: tokens [n], which targets count, bool [n - 1], first token."""
        for first, places in self.extents(row):
            last = first + places + 1
            # A target counts that lies behind an odd number of edges.
            edges_before = np.searchsorted(self._edges, np.arange(first + 1, last), "right")
            yield self.stream.read(first, last), edges_before % 2 == 1, first

    def extents(self, row: int) -> list[tuple[int, int]]:
        """First token and number of places of each segment of a row."""
        segments = self.items(row)[:, None] * self._sides + np.arange(self._sides)
        segments = segments.ravel()
        return list(zip(self._firsts[segments].tolist(), self._places[segments].tolist()))

    def fill(self, row: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a row over the arrays of an empty one, [T] each."""
        place = number = 0
        for number, (tokens, counts, _) in enumerate(self.segments(row), 1):
            span = slice(place, place + len(counts))
            arrays["tokens"][span], arrays["targets"][span] = tokens[:-1], tokens[1:]
            arrays["loss_mask"][span], arrays["segment_ids"][span] = counts, number
            arrays["positions"][span] = np.arange(len(counts))
            place = span.stop
        arrays["segment_ids"][place:] = number + 1
        arrays["positions"][place:] = np.arange(self.length - place)
        if self._sides == 2:
            arrays["pair_ids"][: number // 2] = self.items(row)


def _cut(firsts: np.ndarray, places: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents in pieces of `length` places; one of a single token has none."""
    pieces = -(-places // length)
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    places = np.minimum(np.repeat(places, pieces) - number * length, length)
    return np.repeat(firsts, pieces) + number * length, places


def _trained_edges(source: Source, split: str, offsets: np.ndarray) -> np.ndarray:
    """First token and token after the last of each trained span, one after the other."""
    parts, document = [np.zeros((0, 2), np.int64)], 0
    for info in getattr(source.manifest, split).shards:
        spans = read_spans(source.directory / info.file, info)
        parts.append(offsets[document + spans[:, 0], None] + spans[:, 1:])
        document += info.documents
    return np.concatenate(parts).ravel()


class PackedSources(dict[tuple[str, str], PackedRows]):
    """Both splits of sources, by source and split; `most_pairs` is that of all of them."""

    def __init__(self, sources: Mapping[str, Source], spec: BatchSpec):
        for number, name in enumerate(sorted(sources)):
            for split in ("train", "held_out"):
                self[name, split] = PackedRows(sources[name], split, spec, number)
        self.most_pairs = max((rows.most_pairs for rows in self.values()), default=0)
