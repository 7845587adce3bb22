"""Where the rows of a batch come from: source, file, offset, documents and their text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np

from stablelm_jax.data.manifest import Source
from stablelm_jax.data.mixture import Mixture
from stablelm_jax.data.rows import SourceRows, shuffled, source_seed
from stablelm_jax.data.shards import Shard
from stablelm_jax.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Document:
    """A document, or a part of one, in a row.

    Attributes:
      file: the shard that holds its first token of this row.
      number: which document of that shard it is, from 0; None for a shard behind a URL.
      offset: place of that first token in the shard, in tokens (the byte is 4 times that).
      tokens: how many of its tokens are in this row, its `<|endoftext|>` included.
      opens: whether the document begins here; else the row opens in mid-document.
      text: these tokens as text.
    """

    file: str
    number: int | None
    offset: int
    tokens: int
    opens: bool
    text: str


@dataclasses.dataclass(frozen=True)
class RowPlace:
    """One row of a batch.

    Attributes:
      row: its number in the mixture, from 0.
      source: name of the source.
      epoch: how often the source had been read to its end before.
      source_row: its number in the source, in the order of the shards; there are `source_rows`.
      documents: what its sequence_length tokens belong to, in order.
    """

    row: int
    source: str
    epoch: int
    source_row: int
    source_rows: int
    documents: tuple[Document, ...]


def places(
    sources: Mapping[str, Source],
    mixture: Mixture,
    rows: Sequence[int],
    sequence_length: int,
    seed: int,
    tokenizer: Tokenizer,
) -> Iterator[RowPlace]:
    """The places of some rows of the mixture.

    Raises:
      ShardError, ManifestError: a shard is missing or damaged.
    """
    read = {}
    for row in rows:
        number, index = mixture.locate(row)
        name = mixture.sources[number]
        if name not in read:
            read[name] = _SourceReader(sources[name], sequence_length, seed, tokenizer)
        yield read[name].place(row, index)


class _SourceReader:
    def __init__(self, source: Source, sequence_length: int, seed: int, tokenizer: Tokenizer):
        self._source, self._length, self._tokenizer = source, sequence_length, tokenizer
        rows = SourceRows(source, sequence_length)
        self._stream, self._rows = rows.stream, len(rows)
        numbers = grain.MapDataset.range(self._rows)
        self._numbers = shuffled(numbers, source_seed(seed, source.name))

    def place(self, row: int, index: int) -> RowPlace:
        number = int(self._numbers[index])
        start = number * self._length
        documents = tuple(self._documents(start, start + self._length))
        epoch = index // self._rows
        return RowPlace(row, self._source.name, epoch, number, self._rows, documents)

    def _documents(self, start: int, stop: int) -> Iterator[Document]:
        tokens = self._stream.read(start, stop)
        ends = np.flatnonzero(tokens == self._tokenizer.eod) + 1
        opens = start == 0 or self._stream.read(start - 1, start)[0] == self._tokenizer.eod
        first = 0
        for end in [*ends.tolist(), len(tokens)]:
            if end > first:
                text = self._tokenizer.decode(tokens[first:end].tolist())
                shard, offset = self._stream.locate(start + first)
                number = None
                if isinstance(shard, Shard):
                    number = int(np.searchsorted(shard.document_offsets, offset, side="right")) - 1
                yield Document(str(shard.path), number, offset, end - first, bool(opens), text)
            first, opens = end, True
