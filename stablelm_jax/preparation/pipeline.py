"""The datatrove pipeline of `prepare`: a unit is read, tokenised, and left as parts.

One datatrove task is one unit. datatrove brings the executors (this machine, SLURM, Ray), the
logs of each task, and the list of tasks that are done; what a task makes is ours.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterable, Iterator

from datatrove.pipeline.base import PipelineStep

from stablelm_jax.preparation import units
from stablelm_jax.preparation.parts import PART_BYTES, PartWriter, parts_of_unit
from stablelm_jax.preparation.readers import Rejected
from stablelm_jax.preparation.units import Record
from stablelm_jax.tokenizer import tokenizer as tokenizers

_BUNCH_CHARACTERS = 1 << 20
_BUNCH_RECORDS = 10_000


class ReadUnit(PipelineStep):
    """Yields the records of the task's unit that no finished part holds yet."""

    name = "documents of a unit"
    type = "READER"

    def __init__(self, units_file: str, parts: str, text_key: str):
        super().__init__()
        self.units_file, self.parts, self.text_key = units_file, parts, text_key

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Record]:
        done = parts_of_unit(pathlib.Path(self.parts), rank)
        if done and done[-1].info.last:
            return
        unit = _units(self.units_file)[rank]
        skip = done[-1].info.records if done else 0
        yield from units.read_unit(unit, self.text_key, skip)


class TokenizeToParts(PipelineStep):
    """Tokenises records and writes them as parts."""

    name = "tokens of a unit"
    type = "TOKENIZER"

    def __init__(self, parts: str, tokenizer: str, ranks: str | None):
        super().__init__()
        self.parts, self.tokenizer, self.ranks = parts, tokenizer, ranks

    def run(self, data: Iterable[Record], rank: int = 0, world_size: int = 1) -> None:
        directory = pathlib.Path(self.parts)
        done = parts_of_unit(directory, rank)
        if done and done[-1].info.last:
            return
        tokenizer = _tokenizer(self.tokenizer, self.ranks)
        records = done[-1].info.records if done else 0
        consumed = done[-1].info.consumed if done else 0
        part = PartWriter(directory, rank, number := len(done))
        for bunch in _bunches(data):
            if part.text_bytes >= PART_BYTES:
                part.close(records, consumed, last=False)
                part = PartWriter(directory, rank, number := number + 1)
            _add(part, bunch, tokenizer)
            records += len(bunch)
            consumed = bunch[-1].consumed
        part.close(records, consumed, last=True)


def _bunches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Records by the megabyte.

    Not one by one: reading JSON between two calls of the tokenizer slows the latter by 10 to 15 %
    on the CPU at hand.
    """
    bunch, size = [], 0
    for record in records:
        bunch.append(record)
        size += len(record.content) if isinstance(record.content, str) else 0
        if size >= _BUNCH_CHARACTERS or len(bunch) >= _BUNCH_RECORDS:
            yield bunch
            bunch, size = [], 0
    if bunch:
        yield bunch


def _add(part: PartWriter, bunch: list[Record], tokenizer: tokenizers.Tokenizer) -> None:
    """Tokenises a bunch into a part."""
    texts, tokens = [], []
    for record in bunch:
        content = record.content
        if not isinstance(content, Rejected):
            try:
                ids = tokenizer.encode_document(content)
                content = content if len(ids) else Rejected("the tokenizer makes no token of it")
            except tokenizers.TokenizerError as error:
                content = Rejected(str(error)[:200])
        if isinstance(content, Rejected):
            part.reject(record.file.name, record.line, content.reason)
        else:
            texts.append(content)
            tokens.append(ids)
    if texts:
        part.add(tokens, [text.encode() for text in texts], tokenizer.eod)


@functools.lru_cache(maxsize=1)
def _units(path: str) -> list[units.Unit]:
    return units.load(pathlib.Path(path))


@functools.lru_cache(maxsize=1)
def _tokenizer(name: str, ranks: str | None) -> tokenizers.Tokenizer:
    """Once a process: a worker runs many tasks."""
    return tokenizers.load_tokenizer(name, ranks=ranks)
