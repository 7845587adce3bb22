"""Batches: rows of the mixture with documents marked, for training and for held-out loss.

Legend: B rows of this process, T sequence length, R = T + 1 tokens of a row.

A batch is a dict of
    tokens       int32   [B, T]  inputs, row[:-1]
    targets      int32   [B, T]  row[1:]
    segment_ids  int32   [B, T]  document of each input within its row, from 1 on
    positions    int32   [B, T]  place in the document, from 0; a row may open in mid-document
    loss_mask    float32 [B, T]  1 where the target counts
    source_ids   int32   [B]     index of the row's source among the sorted names of the mixture
`<|endoftext|>` belongs to the document that it ends; the next token opens a new one.

In packed rows no id tells documents apart: each is a segment, whose first token is no target. What
is left of a row is one more segment, of `<|endoftext|>` under a loss mask of 0. Pairs also have
    pair_ids     int32   [B, P]  numbers of a row's pairs within their source and split, then -1
where P is the most pairs that any row has, and pair k of a row, from 0, is its segments 2k + 1
(chosen) and 2k + 2 (rejected).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import grain
import numpy as np

from stablelm_jax.data.manifest import Source
from stablelm_jax.data.mixture import Mixture
from stablelm_jax.data.packing import PackedRow, PackedSources
from stablelm_jax.data.rows import SourceRows, token_stream
from stablelm_jax.data.skipping import LeftOut, leave_out

Batch = dict[str, np.ndarray]
_BY_TOKEN = ("tokens", "targets", "loss_mask")
_ENDLESS = 2**53  # batches; grain divides lengths as floats, and this is the last exact one


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """What a batch of the whole job looks like: `batch_size` rows of `sequence_length` tokens."""

    sequence_length: int
    batch_size: int  # of training: the first
    seed: int  # of the shuffles
    eod: int  # id of `<|endoftext|>`
    loss_on_first_token: bool = True  # the one after an `<|endoftext|>`; True as in NeoX
    packing: str = "concatenate"  # or 'best_fit', or 'one' item a row
    loss_on: str = "answers"  # of packed rows: their trained spans, or 'all'

    def rows_of_a_process(self, process_count: int) -> int:
        """B, or a ValueError where the processes cannot share the batch evenly."""
        rows, rest = divmod(self.batch_size, process_count)
        if rest or rows < 1:
            raise ValueError(
                f"data.batch_size {self.batch_size} over {process_count} processes:"
                " make it a positive multiple of the processes"
            )
        return rows


def train_batches(
    sources: Mapping[str, Source],
    mixture: Mixture,
    spec: BatchSpec,
    *,
    start_row: int = 0,
    first_row: Callable[[int], int] | None = None,
    pieces: Callable[[int], int] = lambda n: 1,
    share: tuple[int, int] = (0, 1),
    prefetch: int = 2,
    packed: PackedSources | None = None,
    left_out: Mapping[str, LeftOut] = MappingProxyType({}),
) -> Iterator[Batch]:
    """This process's part of the batches from global row `start_row` on, without end.

    Batch n of the job is the global rows [start_row + n * batch_size, + batch_size), or, where
    batches are not of one size, [first_row(n), first_row(n + 1)). `share` is (p, P): of P equal
    parts of each batch, the p-th. Row i depends on the data, the sequence length, the seed, the
    mixture and what is `left_out` of it alone: neither hosts nor restarts change it.

    `pieces`: f(n), into how many each row of batch n is cut, see `cut`.

    `prefetch` batches are made ahead, by a thread for every two of them; 0 makes them in `next`. A
    thread reads the B rows of its batch one by one: a step waits for slow storage where
    B * seconds a read / threads is more than its own time (`benchmarks/data.py --latency-ms`).

    An error in making a batch ends them, and so does `close`, which returns when the threads are
    gone: no batch is skipped.

    `packed`: the sources of the mixture; None: they are packed here, where `spec` says so.

    Raises:
      ValueError: a source that does not fill a row; a batch size that the processes cannot share.
      ShardError: a shard that is missing or damaged.
    """
    spec.rows_of_a_process(share[1])
    skips = [left_out.get(name) for name in mixture.sources]
    if spec.packing == "concatenate":
        all_rows = [
            SourceRows(sources[name], spec.sequence_length, spec.seed, number)
            for number, name in enumerate(mixture.sources)
        ]
    else:
        packed = packed or PackedSources({name: sources[name] for name in mixture.sources}, spec)
        all_rows = [packed[name, "train"] for name in mixture.sources]

    def row_of(n: int) -> int:
        return start_row + n * spec.batch_size if first_row is None else first_row(n)

    def batch(n: int) -> Batch:
        size = (row_of(n + 1) - row_of(n)) // share[1]
        first = row_of(n) + share[0] * size
        drawn = [mixture.locate(row) for row in range(first, first + size)]
        chosen = [(all_rows[number], all_rows[number].order(index)) for number, index in drawn]
        if packed is None:
            rows_BR = np.stack([rows.tokens(row) for rows, row in chosen])
            made = collate(rows_BR, [rows.source_id for rows, _ in chosen], spec)
        else:
            made = collate_packed(chosen, spec, packed.most_pairs)
        if left_out:
            made = leave_out(made, [row for _, row in chosen], skips)
        return cut(made, pieces(n), spec.eod)

    return _made_ahead(grain.MapDataset.range(_ENDLESS).map(batch), prefetch)


def _made_ahead(batches: grain.MapDataset[Batch], prefetch: int) -> Iterator[Batch]:
    """Batches in order, made ahead by grain's threads; an error or `close` stops these."""
    # Few threads: they share the interpreter, and only waiting for a disk is done in parallel.
    # On one core, 2 threads instead of 1 cost 15 % of the speed.
    threads = (prefetch + 1) // 2
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    iterator = iter(batches.to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()
        # grain tells its threads to stop, but does not wait for them.
        if (executor := getattr(iterator, "_executor", None)) is not None:
            executor.shutdown(wait=True)


def held_out_batches(
    sources: Mapping[str, Source],
    name: str,
    spec: BatchSpec,
    *,
    max_rows: int,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """The batches that score each held-out token of a source once, in order.

    Only the first `max_rows` rows are scored. The first token has nothing before it and is no
    target. What is left of the last row, and of the last batch, is filled with `<|endoftext|>`
    under a loss mask of 0. `source_ids` is the source's place among the sorted names of `sources`.
    The seed plays no part. `share` as in `packed_batches`.

    Raises:
      ValueError: fewer than two held-out tokens, or a batch size that the processes cannot share.
      ShardError: a shard that is missing or damaged.
    """
    (index, count), length = share, spec.sequence_length
    size, stream = spec.rows_of_a_process(count), token_stream(sources[name], "held_out")
    if stream.num_tokens < 2:
        raise ValueError(
            f"{sources[name].directory}: {stream.num_tokens} held-out tokens, nothing to score;"
            " prepare the source again with a larger held-out fraction"
        )
    total = min(math.ceil((stream.num_tokens - 1) / length), max_rows)
    source_ids = [sorted(sources).index(name)] * size
    for first in range(index * size, index * size + total, spec.batch_size):
        rows_BR = np.full((size, length + 1), spec.eod, np.int32)
        scored_BT = np.zeros((size, length), np.float32)
        for place, row in enumerate(range(first, min(first + size, total))):
            start = row * length
            tokens = stream.read(start, min(start + length + 1, stream.num_tokens))
            rows_BR[place, : len(tokens)] = tokens
            scored_BT[place, : len(tokens) - 1] = 1
        batch = collate(rows_BR, source_ids, spec)
        batch["loss_mask"] *= scored_BT
        yield batch


def packed_batches(
    packed: PackedSources,
    name: str,
    split: str,
    spec: BatchSpec,
    *,
    max_rows: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """The batches that hold each packed row of a split once, in order.

    Only the first `max_rows` rows, where given. The last batch is filled with empty rows. `share`
    is (p, P): of P equal parts of each batch, the p-th; all have the same number of batches.
    """
    (index, count), rows = share, packed[name, split]
    size, total = spec.rows_of_a_process(count), min(len(rows), max_rows or len(rows))
    for first in range(index * size, index * size + total, spec.batch_size):
        chosen = [(rows, n if n < total else None) for n in range(first, first + size)]
        yield collate_packed(chosen, spec, packed.most_pairs)


def collate(rows_BR: np.ndarray, source_ids: Sequence[int], spec: BatchSpec) -> Batch:
    """The batch of some rows, int32 [B, T + 1], and the sources they come from."""
    tokens_BT = np.ascontiguousarray(rows_BR[:, :-1])
    segment_ids_BT, positions_BT = mark_documents(tokens_BT, spec.eod)
    if spec.loss_on_first_token:
        loss_mask_BT = np.ones(tokens_BT.shape, np.float32)
    else:
        loss_mask_BT = (tokens_BT != spec.eod).astype(np.float32)
    return {
        "tokens": tokens_BT,
        "targets": np.ascontiguousarray(rows_BR[:, 1:]),
        "segment_ids": segment_ids_BT,
        "positions": positions_BT,
        "loss_mask": loss_mask_BT,
        "source_ids": np.array(source_ids, np.int32),
    }


def cut(batch: Batch, pieces: int, eod: int) -> Batch:
    """The batch with every row cut into so many of one length, which follow one another.

    Token by token it is the same text with the same targets; a piece that opens in mid-document
    starts at position 0 and sees nothing before it, as a row does.
    """
    if pieces == 1:
        return batch
    rows = {name: batch[name].reshape(len(batch[name]) * pieces, -1) for name in _BY_TOKEN}
    rows["segment_ids"], rows["positions"] = mark_documents(rows["tokens"], eod)
    return rows | {"source_ids": np.repeat(batch["source_ids"], pieces)}


def collate_packed(rows: Sequence[PackedRow], spec: BatchSpec, pairs: int) -> Batch:
    """The batch of some packed rows; `pairs` is P, and where it is 0 there are no `pair_ids`."""
    shape = len(rows), spec.sequence_length
    batch = {
        "tokens": np.full(shape, spec.eod, np.int32),
        "targets": np.full(shape, spec.eod, np.int32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
        "loss_mask": np.zeros(shape, np.float32),
        "source_ids": np.array([packed.source_id for packed, _ in rows], np.int32),
    }
    if pairs:
        batch["pair_ids"] = np.full((shape[0], pairs), -1, np.int32)
    for place, (packed, number) in enumerate(rows):
        if number is not None:
            packed.fill(number, {name: array[place] for name, array in batch.items()})
    return batch


def mark_documents(tokens_BT: np.ndarray, eod: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids (from 1) and positions (from 0) of inputs [B, T], both int32 [B, T].

    Works on the few places where a document opens and spreads the result by `np.repeat`: three
    times as fast as running sums over all tokens.
    """
    opens_BT = np.empty(tokens_BT.shape, bool)
    opens_BT[:, 0] = True
    np.equal(tokens_BT[:, :-1], eod, out=opens_BT[:, 1:])
    # One entry a document from here on, over the rows laid end to end.
    starts = np.flatnonzero(opens_BT)
    lengths = np.empty_like(starts)
    np.subtract(starts[1:], starts[:-1], out=lengths[:-1])
    lengths[-1] = tokens_BT.size - starts[-1]
    first_of_row = np.searchsorted(starts, starts - starts % tokens_BT.shape[1])
    numbers = np.arange(1, len(starts) + 1) - first_of_row
    segment_ids = np.repeat(numbers.astype(np.int32), lengths)
    positions = np.arange(tokens_BT.size, dtype=np.int32)
    positions -= np.repeat(starts.astype(np.int32), lengths)
    return segment_ids.reshape(tokens_BT.shape), positions.reshape(tokens_BT.shape)
