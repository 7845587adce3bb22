"""The input cut into chunks, the pieces of work of `prepare`.

A chunk is a byte range of a file of JSON lines, some row groups of a parquet file, a file that
cannot be divided, or a run of small files. The cut depends on the inputs alone, never on how many
workers there are. Chunks in their order, and records in order within them, are the order of the
documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from stablelm_jax.preparation import readers, streams, tokenised
from stablelm_jax.preparation.finding import InputFile
from stablelm_jax.preparation.formats import Reading
from stablelm_jax.preparation.keeping import NotKept
from stablelm_jax.preparation.tables import PARQUET_ERRORS
from stablelm_jax.preparation.tokenised import TokenisedReader

# A chunk becomes a shard of about its size: a token of 4 bytes stands for about 4 bytes of text.
# One GiB takes a worker two minutes, which is what is lost when it is killed. Of a smaller source
# there are chunks enough to keep many workers busy.
_MAX_CHUNK_BYTES = 1 << 30
_MIN_CHUNK_BYTES = 8 << 20
_CHUNKS_PER_SOURCE = 64
_THREADS = 16
SAMPLE_PLACES = 8  # where a sample is read


class Chunk(NamedTuple):
    """Files to be read whole, or a range (bytes or row groups) of one file."""

    files: tuple[InputFile, ...]
    size: int  # bytes of input, for progress
    start: int = 0
    end: int | None = None
    first: int = 0  # rows of the parquet file that lie before the range
    limit: int | None = None  # documents to read at most, of a sample


class Record(NamedTuple):
    """A record of a chunk: where it lies, and its text or why it gives none."""

    file: InputFile
    line: int  # from 1 on; in a byte range of a file it counts from the start of the range
    content: str | streams.Rejected | NotKept
    consumed: int  # bytes of the chunk's files read so far
    left: int = 0  # bytes of its file, or of the range of it, that follow


def cut(files: Sequence[InputFile]) -> list[Chunk]:
    """Cuts files into chunks, in order."""
    total = sum(file.size or 0 for file in files)
    size = min(_MAX_CHUNK_BYTES, max(_MIN_CHUNK_BYTES, total // _CHUNKS_PER_SOURCE))
    large = [file for file in files if file.kind == tokenised.KIND or (file.size or 0) >= size]
    with ThreadPoolExecutor(_THREADS) as pool:
        divided = dict(zip(large, pool.map(lambda file: _ranges(file, size), large)))
    chunks: list[Chunk] = []
    group: list[InputFile] = []
    held = 0
    for file in files:
        ranges = divided.get(file) or [Chunk((file,), file.size or 0)]
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


def cut_sample(files: Sequence[InputFile], documents: int) -> list[Chunk]:
    """Chunks of which so many documents are read in all, from places spread over the files."""
    of_each = max(1, SAMPLE_PLACES // len(files))
    places = [chunk for file in files for chunk in spread(cut([file]), of_each)]
    shares = np.diff(np.linspace(0, documents, len(places) + 1).astype(int)).tolist()
    return [chunk._replace(limit=share) for chunk, share in zip(places, shares) if share]


def spread(items: Sequence, count: int) -> list:
    """As many of the items, at even distances, the first one among them."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def _ranges(file: InputFile, size: int) -> list[Chunk]:
    """The chunks of a large file; none if it cannot be divided."""
    if file.kind == tokenised.KIND:
        runs = tokenised.document_ranges(file.path, size)
        return [Chunk((file,), size, start, end, start) for start, end, size in runs]
    if file.kind == "parquet":
        return _row_groups(file, size) if file.divisible else []
    if not readers.can_be_divided(file):
        return []
    edges = [*range(0, file.size, size), file.size]
    return [Chunk((file,), end - start, start, end) for start, end in zip(edges, edges[1:])]


def _row_groups(file: InputFile, size: int) -> list[Chunk]:
    """Runs of row groups of a file; none if it is damaged, which its reader will say."""
    with streams.open_input(file.path, seekable=True, size=file.size) as opened:
        try:
            footer = pq.ParquetFile(opened).metadata
        except PARQUET_ERRORS as error:
            if isinstance(error, OSError) and not streams.is_of_the_file(error):
                raise
            return []
    ranges: list[Chunk] = []
    start = first = held = rows = 0
    for number, group in enumerate(map(footer.row_group, range(footer.num_row_groups))):
        if held and held + group.total_byte_size > size:
            ranges.append(Chunk((file,), held, start, number, first))
            start, first, held = number, rows, 0
        held += group.total_byte_size
        rows += group.num_rows
    return [*ranges, Chunk((file,), held, start, footer.num_row_groups, first)]


def read_chunk(
    chunk: Chunk, reading: Reading, skip: int = 0, ids: TokenisedReader | None = None
) -> Iterator[Record]:
    """Every record of a chunk, in order, except the first `skip`; `ids` reads what is tokenised."""
    meter, documents = streams.Meter(), 0
    for file in chunk.files:
        if file.kind == tokenised.KIND:
            contents = ids.read(file.path, chunk.start, chunk.end, meter)
        else:
            contents = readers.read_file(file, reading, meter, chunk.start, chunk.end)
        end = meter.consumed + (chunk.size if chunk.end is not None else file.size or 0)
        for line, content in enumerate(contents, chunk.first + 1):
            if skip:
                skip -= 1
            else:
                left = max(0, end - meter.consumed)
                yield Record(file, line, content, meter.consumed, left)
            documents += isinstance(content, str)
            if documents == chunk.limit:
                return


def chunks_from_json(saved: list) -> list[Chunk]:
    """Chunks that were written as JSON."""
    return [Chunk(tuple(InputFile(*file) for file in files), *rest) for files, *rest in saved]
