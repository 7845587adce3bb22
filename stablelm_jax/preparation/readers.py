"""Documents out of files of every kind, local or remote.

Reading a file gives one item for each record, in order: the text of a document, or a `Rejected`
that says why there is none. So damage is never fatal and never silent, and the position of an item
is its line (jsonl), its row (tables), its number (JSON, archives, texts that are split), or 1.

An input that cannot be read for reasons that may pass (a network, a disk) does raise.
"""

from __future__ import annotations

import functools
import io
import tarfile
import zipfile
from collections.abc import Iterator
from typing import BinaryIO

from stablelm_jax.preparation import formats, json_records, streams
from stablelm_jax.preparation.archives import read_tar, read_warc, read_zip
from stablelm_jax.preparation.finding import InputFile
from stablelm_jax.preparation.formats import HEAD, Reading, kind_of, missing_package, what_is
from stablelm_jax.preparation.hub import PINNED
from stablelm_jax.preparation.json_records import lies_in_lines, parse, read_json
from stablelm_jax.preparation.streams import Blocks, Damaged, Meter, Rejected, as_utf8, blocks_of
from stablelm_jax.preparation.tables import read_arrow, read_csv, read_parquet
from stablelm_jax.preparation.texts import read_html, read_text, whole
from stablelm_jax.storage.remote import described, is_url

_TEXTS = {
    "text": read_text,
    "html": read_html,
    "jsonl": functools.partial(read_json, lines=True),
    "json": read_json,
    "csv": read_csv,
    "tsv": read_csv,
}
_STREAMED = {**_TEXTS, "arrow": read_arrow, "warc": read_warc}
_SEEKING = ("parquet", "zip")
_RECORDS_BYTES = 1 << 20  # looked at to find out whether a text holds records
# What files behind a URL raise that are unlike all that was thought of. Anything else may be the
# driver's, and so the network's; on this machine nothing but OSError is.
_ODD = (
    ValueError, LookupError, TypeError, ArithmeticError, RecursionError, NotImplementedError,
    EOFError, MemoryError, tarfile.TarError, zipfile.BadZipFile,
)  # fmt: skip


def read_file(
    file: InputFile,
    reading: Reading,
    meter: Meter | None = None,
    start: int = 0,
    end: int | None = None,
) -> Iterator[str | Rejected]:
    """The records of a file.

    `start` and `end`: only the lines that begin in these bytes (JSON that `can_be_divided`), or
    only these row groups (parquet).
    """
    try:
        yield from _records(file, reading, meter or Meter(), start, end)
    except Damaged as error:
        yield Rejected(str(error))
    except Exception as error:
        is_remote = is_url(file.path)
        if isinstance(error, PermissionError) and not is_remote:
            yield Rejected("no permission to read it")
            return
        if not _lies_in_the_file(error, is_remote):
            raise
        text = f"damaged {file.kind}, the rest of the file is lost: {described(error)}"
        yield Rejected(text[:200])


def _lies_in_the_file(error: Exception, is_remote: bool) -> bool:
    if isinstance(error, OSError):
        return not is_remote and streams.is_of_the_file(error)
    return isinstance(error, _ODD) or not (is_remote or isinstance(error, ImportError))


def _records(
    file: InputFile, reading: Reading, meter: Meter, start: int, end: int | None
) -> Iterator[str | Rejected]:
    is_range = bool(start or end is not None)
    seeks = is_range or file.kind in _SEEKING
    # Each seek in a file of the Hub is one of the few requests that it allows.
    is_small = PINNED.match(file.path) and file.size <= streams.MAX_DOCUMENT_BYTES and not is_range
    as_a_whole = seeks and bool(is_small or not file.divisible)
    seekable = seeks and not as_a_whole
    with streams.open_input(file.path, seekable=seekable, size=file.size) as opened:
        if as_a_whole:  # also where a server gives a file from its beginning only
            data = whole(blocks_of(opened, Meter()))
            if isinstance(data, Rejected):
                yield Rejected("too large for a server that gives whole files: download it first")
                return
            opened = io.BytesIO(data)
        if file.kind in _SEEKING and file.compression:
            yield Rejected(f"a compressed {file.kind} file: decompress it first")
        elif is_range and file.kind != "parquet":
            blocks = blocks_of(opened, meter, *line_range(opened, start, end))
            lines = streams.cut_at(blocks if start else as_utf8(blocks), b"\n")
            yield from (parse(line, reading) for line in lines)
        elif file.kind in _SEEKING:
            problem = _why_not(file.kind, opened.read(HEAD), reading)
            opened.seek(0)
            if problem:
                yield problem
            elif file.kind == "parquet":
                yield from read_parquet(opened, reading, meter, start, end)
            else:
                yield from read_zip(opened, functools.partial(_member, reading), meter)
        else:
            blocks = streams.unpacked(blocks_of(opened, meter), file.compression, meter)
            yield from _streamed(file.kind, blocks, reading)


def _streamed(kind: str, blocks: Blocks, reading: Reading) -> Iterator[str | Rejected]:
    head, blocks = streams.peek(as_utf8(blocks) if kind in _TEXTS else blocks, HEAD)
    if kind == "text" and head.lstrip()[:1] in (b"{", b"["):
        head, blocks = streams.peek(blocks, _RECORDS_BYTES)
    if problem := _why_not(kind, head, reading):
        yield problem
    elif kind == "tar":
        yield from read_tar(blocks, functools.partial(_member, reading))
    else:
        yield from _STREAMED[kind](blocks, reading)


def _why_not(kind: str, head: bytes, reading: Reading) -> Rejected | None:
    """Why a kind cannot be read: it is known to be another, or a package is missing."""
    if kind == "text" and reading.format == "auto" and not reading.split_on:
        what = "html" if formats.PAGE.match(head) else ""
        what = "json" if json_records.are_records(head, reading) else what
        if what:
            text = f"a text that holds {what.upper()}"
            return Rejected(f"{text}: --format {what} reads it, --format text takes it as it is")
    if reading.wants_records and kind in ("text", "html", "warc"):
        return Rejected("a text, where records are asked for")
    name, missing = what_is(head), missing_package(kind)
    if name and not name.startswith(kind):
        return Rejected(f"{name}, not {kind}")
    return Rejected(missing) if missing else None


def _member(reading: Reading, name: str, file: BinaryIO) -> Iterator[str | Rejected]:
    """The records of a file of an archive."""
    meter = Meter()
    kind, compression = kind_of(name, reading.format)
    if any(part.strip(".") and part[0] == "." for part in name.split("/")) or "__MACOSX" in name:
        yield Rejected("hidden in an archive")
        return
    blocks = streams.unpacked(blocks_of(file, meter), compression, meter)
    if kind == "parquet":
        data = whole(blocks)
        is_bytes = isinstance(data, bytes)
        yield from read_parquet(io.BytesIO(data), reading, meter) if is_bytes else [data]
    elif kind in _STREAMED:
        yield from _streamed(kind, blocks, reading)
    else:
        yield Rejected(f"{kind} archive in an archive: unpack it first")


def can_be_divided(file: InputFile) -> bool:
    """Whether a file holds a JSON record a line, as it lies on disk."""
    if file.kind not in ("json", "jsonl") or file.compression or not file.divisible:
        return False
    with streams.open_input(file.path, size=file.size) as opened:
        head, blocks = streams.peek(blocks_of(opened, Meter()), HEAD)
        if what_is(head) or streams.compression_of(head) or head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return False
        return lies_in_lines(as_utf8(blocks), unless_clear=file.kind == "jsonl")[0]


def line_range(file, start: int, end: int | None) -> tuple[int, int | None]:
    """The exact bytes of the lines that begin in [start, end): neighbouring ranges meet."""
    begin = _line_start(file, start, end)
    if end is None or begin >= end:
        return begin, end
    return begin, _line_start(file, end, None)


def _line_start(file, offset: int, stop: int | None) -> int:
    """Where the first line at or after `offset` begins; looks no further than `stop`."""
    if offset == 0:
        return 0
    position = offset - 1
    file.seek(position)
    while stop is None or position < stop:
        block = file.read(1 << 16)
        found = block.find(b"\n")
        if found >= 0 or not block:
            return position + found + 1
        position += len(block)
    return position
