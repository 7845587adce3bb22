"""The input cut into chunks, the pieces of work of `prepare`.

A chunk is a byte range of one jsonl file, some row groups of one parquet file, one compressed file,
or a run of small files. The cut depends on the inputs alone, never on how many workers there are.
Chunks in their order, and records in order within them, are the order of the documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow.parquet as pq

from stablelm_jax.preparation import readers
from stablelm_jax.preparation.inputs import InputFile

# A chunk becomes a shard of about its size: a token of 4 bytes stands for about 4 bytes of text.
# One GiB takes a worker two minutes, which is what is lost when it is killed. Of a smaller source
# there are chunks enough to keep many workers busy.
_MAX_CHUNK_BYTES = 1 << 30
_MIN_CHUNK_BYTES = 8 << 20
_CHUNKS_PER_SOURCE = 64
_FOOTER_THREADS = 16


class Chunk(NamedTuple):
    """Files to be read whole, or a range (bytes or row groups) of one file.

    Attributes:
      size: bytes of input, for progress.
      start, end: the range.
      first: rows of the file that lie before the range.
    """

    files: tuple[InputFile, ...]
    size: int
    start: int = 0
    end: int | None = None
    first: int = 0


class Record(NamedTuple):
    """A record of a chunk: where it lies, and its text or why there is none.

    Attributes:
      line: counted from 1; in a byte range of a file it counts from the start of the range.
      consumed: bytes of the chunk's files read so far.
    """

    file: InputFile
    line: int
    content: str | readers.Rejected
    consumed: int


def cut(files: Sequence[InputFile]) -> list[Chunk]:
    """Cuts files into chunks, in order."""
    total = sum(file.size or 0 for file in files)
    size = min(_MAX_CHUNK_BYTES, max(_MIN_CHUNK_BYTES, total // _CHUNKS_PER_SOURCE))
    large = [file for file in files if file.kind == "parquet" and (file.size or size) >= size]
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        footers = dict(zip([file.path for file in large], pool.map(_row_groups, large)))
    chunks: list[Chunk] = []
    group: list[InputFile] = []
    held = 0
    for file in files:
        ranges = _ranges(file, size, footers.get(file.path))
        alone = len(ranges) > 1 or file.size is None
        if group and (alone or held + file.size > size):
            chunks.append(Chunk(tuple(group), held))
            group, held = [], 0
        if alone:
            chunks += ranges
        else:
            group.append(file)
            held += file.size
    return chunks + ([Chunk(tuple(group), held)] if group else [])


def _ranges(file: InputFile, size: int, row_groups: list[tuple[int, int]] | None) -> list[Chunk]:
    """The chunks of one file; a single one where it is small or cannot be divided."""
    if row_groups:
        return list(_row_group_ranges(file, size, row_groups))
    if file.kind == "jsonl" and file.divisible and file.size and not file.compression:
        edges = [*range(0, file.size, size), file.size]
        return [Chunk((file,), end - start, start, end) for start, end in zip(edges, edges[1:])]
    return [Chunk((file,), file.size or 0)]


def _row_group_ranges(file: InputFile, size: int, row_groups) -> Iterator[Chunk]:
    start = first = held = rows = 0
    for number, (group_bytes, group_rows) in enumerate(row_groups):
        if held and held + group_bytes > size:
            yield Chunk((file,), held, start, number, first)
            start, first, held, rows = number, first + rows, 0, 0
        held += group_bytes
        rows += group_rows
    yield Chunk((file,), held, start, len(row_groups), first)


def _row_groups(file: InputFile) -> list[tuple[int, int]] | None:
    """(bytes, rows) of each row group; None for a damaged file: its reader says so."""
    with readers.open_input(file.path, seekable=True) as opened:
        try:
            footer = pq.ParquetFile(opened).metadata
        except readers.PARQUET_ERRORS:
            return None
    groups = map(footer.row_group, range(footer.num_row_groups))
    return [(group.total_byte_size, group.num_rows) for group in groups]


def read_chunk(chunk: Chunk, text_key: str, skip: int = 0) -> Iterator[Record]:
    """Every record of a chunk, in order, except the first `skip`."""
    meter = readers.Meter()
    for file in chunk.files:
        if file.kind == "jsonl":
            contents = readers.read_jsonl(
                file.path, text_key, file.compression, chunk.start, chunk.end, meter
            )
        elif file.kind == "parquet":
            contents = readers.read_parquet(file.path, text_key, chunk.start, chunk.end, meter)
        else:
            contents = readers.read_text(file.path, file.compression, meter)
        for line, content in enumerate(contents, chunk.first + 1):
            if skip:
                skip -= 1
            else:
                yield Record(file, line, content, meter.consumed)


def from_json(saved: list) -> list[Chunk]:
    """Chunks that were written as JSON."""
    return [Chunk(tuple(InputFile(*file) for file in files), *rest) for files, *rest in saved]
