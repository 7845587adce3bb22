"""Where the rows of a batch come from: source, file, offset, documents and their text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from stablelm_jax.data.batches import BatchSpec
from stablelm_jax.data.manifest import Source
from stablelm_jax.data.mixture import Mixture
from stablelm_jax.data.packing import PackedSources
from stablelm_jax.data.rows import SourceRows
from stablelm_jax.data.shards import Shard
from stablelm_jax.data.skipping import LeftOut
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
      item: in a packed row, which conversation, pair (and side of it) or document this is.
      parts: there, the text in parts: each with whether it is trained, or only read.
    """

    file: str
    number: int | None
    offset: int
    tokens: int
    opens: bool
    text: str
    item: str = ""
    parts: tuple[tuple[str, bool], ...] = ()


@dataclasses.dataclass(frozen=True)
class RowPlace:
    """One row of a batch.

    Attributes:
      row: its number in the mixture, from 0.
      source: name of the source.
      epoch: how often the source had been read to its end before.
      source_row: its number in the source, in the order of the shards; there are `source_rows`.
      documents: what its sequence_length tokens belong to, in order.
      left_out: how many of these tokens `data.skip` leaves out.
    """

    row: int
    source: str
    epoch: int
    source_row: int
    source_rows: int
    documents: tuple[Document, ...]
    left_out: int = 0


def places(
    sources: Mapping[str, Source],
    mixture: Mixture,
    rows: Sequence[int],
    spec: BatchSpec,
    tokenizer: Tokenizer,
    packed: PackedSources | None = None,
    left_out: Mapping[str, LeftOut] = MappingProxyType({}),
) -> Iterator[RowPlace]:
    """The places of some rows of the mixture; `packed` and `left_out` are those of the run.

    Raises:
      ShardError, ManifestError: a shard is missing or damaged.
    """
    read = {}
    for row in rows:
        number, index = mixture.locate(row)
        name = mixture.sources[number]
        if name not in read:
            read[name] = _SourceReader(sources[name], spec, tokenizer, packed)
        place = read[name].place(row, index)
        skipped = left_out[name].places(place.source_row) if name in left_out else None
        yield place if skipped is None else dataclasses.replace(place, left_out=int(skipped.sum()))


def parts_of(
    tokenizer: Tokenizer, tokens: np.ndarray, trained: np.ndarray
) -> tuple[tuple[str, bool], ...]:
    """`Document.parts`; `trained`, bool [tokens], says which of them are targets that count."""
    cuts = np.flatnonzero(np.diff(trained)) + 1
    texts = [tokenizer.decode(part.tolist()) for part in np.split(tokens, cuts)]
    return tuple(zip(texts, trained[[0, *cuts]].tolist()))


class _SourceReader:
    def __init__(
        self, source: Source, spec: BatchSpec, tokenizer: Tokenizer, packed: PackedSources | None
    ):
        self._name, self._kind = source.name, source.manifest.kind
        self._length, self._tokenizer = spec.sequence_length, tokenizer
        self._packed = packed and packed[source.name, "train"]
        rows = self._packed or SourceRows(source, self._length, spec.seed)
        self._stream, self._rows, self._order = rows.stream, len(rows), rows.order

    def place(self, row: int, index: int) -> RowPlace:
        number = self._order(index)
        found = self._items(number) if self._packed else self._documents(number * self._length)
        return RowPlace(row, self._name, index // self._rows, number, self._rows, tuple(found))

    def _documents(self, start: int) -> Iterator[Document]:
        tokens = self._stream.read(start, start + self._length)
        ends = np.flatnonzero(tokens == self._tokenizer.eod) + 1
        opens = start == 0 or self._stream.read(start - 1, start)[0] == self._tokenizer.eod
        first = 0
        for end in [*ends.tolist(), len(tokens)]:
            if end > first:
                yield self._document(start + first, tokens[first:end], bool(opens))
            first, opens = end, True

    def _items(self, row: int) -> Iterator[Document]:
        """The documents of a packed row."""
        opening = self._stream.document_offsets()
        sides = (", chosen", ", rejected") if self._kind == "pairs" else ("",)
        kind = "piece" if self._kind == "text" else self._kind.removesuffix("s")
        names = [f"{kind} {i:,}{side}" for i in self._packed.items(row) for side in sides]
        for name, (tokens, counts, first) in zip(names, self._packed.segments(row)):
            parts = parts_of(self._tokenizer, tokens, np.append(False, counts))
            yield self._document(first, tokens, bool(np.isin(first, opening)), name, parts)

    def _document(
        self, position: int, tokens: np.ndarray, opens: bool, item: str = "", parts: tuple = ()
    ) -> Document:
        shard, offset = self._stream.locate(position)
        number = None
        if isinstance(shard, Shard):
            number = int(np.searchsorted(shard.document_offsets, offset, side="right")) - 1
        text, place = self._tokenizer.decode(tokens.tolist()), (str(shard.path), number, offset)
        return Document(*place, len(tokens), opens, text, item, parts)
