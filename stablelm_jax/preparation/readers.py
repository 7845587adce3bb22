"""Documents out of files: jsonl, parquet and plain text, compressed or not, local or remote.

Every reader yields one item for each record, in order: the text of a document, or a `Rejected` that
says why there is none. So damage is never fatal and never silent, and the position of an item is
its line (jsonl), its row (parquet), or 1 (a file that is one document).

Bytes are read and decoded a line at a time: a bad byte costs its own line, not the rest of the
file. An input that cannot be read for reasons that may pass (a network, a disk) does raise.
"""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from collections.abc import Callable, Iterator

import fsspec
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from stablelm_jax.storage.remote import driver_options, is_http, is_url

# A longer document is refused: it has to fit into memory several times over in every worker.
MAX_DOCUMENT_BYTES = 128 * 2**20
# pyarrow's errors of a damaged file; UnicodeDecodeError comes from column names.
PARQUET_ERRORS = (OSError, pa.ArrowException, UnicodeDecodeError)

_BLOCK = 1 << 20
# Damage in a compressed stream loses what the failing call would have returned: feed it little.
_PIECE = 4096
# Text has no zero byte; what is binary has one early.
_HEAD = 8192
_PARQUET_ROWS = 256
# Published dumps are written with `zstd --long=31`; the decoder has to be allowed such a window.
_ZSTD_WINDOW = 2**31
_BOM = b"\xef\xbb\xbf"
_TEXT_TYPES = (
    pa.string(), pa.large_string(), pa.string_view(),
    pa.binary(), pa.large_binary(), pa.binary_view(),
)  # fmt: skip
_JSON_NAMES = {
    dict: 'object', list: 'array', str: 'string', int: 'number', float: 'number',
    bool: 'boolean', type(None): 'null',
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A record that gives no document, and why."""

    reason: str


def reason_kind(reason: str) -> str:
    """The part of a reason that is the same for many records, for counting."""
    return re.split(r"[:(]", reason)[0].strip()


@dataclasses.dataclass
class Meter:
    """Bytes of the input read so far, as they lie on disk: what progress is measured in."""

    consumed: int = 0


def open_input(path: str, *, seekable: bool = False):
    """A binary file from a local path or any fsspec URL, to be used in a `with`."""
    if not is_url(path):
        return open(path, "rb")
    # A page that is read from start to end comes in one answer, also from servers without ranges.
    streamed = is_http(path) and not seekable
    return fsspec.open(
        path, "rb", **({"block_size": 0} if streamed else {}), **driver_options(path)
    )


def read_jsonl(
    path: str,
    text_key: str,
    compression: str | None = None,
    start: int = 0,
    end: int | None = None,
    meter: Meter | None = None,
) -> Iterator[str | Rejected]:
    """One document a line, its text under `text_key`.

    `start` and `end`: only the lines that begin in these bytes, of a file that is not compressed.
    """
    meter = meter or Meter()
    with open_input(path, seekable=bool(start or end)) as file:
        if compression:
            blocks = _decompressed(file, compression, meter)
        else:
            blocks = _plain(file, *line_range(file, start, end), meter)
        for number, line in enumerate(_lines(blocks)):
            if isinstance(line, bytes) and start == number == 0:
                line = line.removeprefix(_BOM)
            yield line if isinstance(line, Rejected) else parse_json_line(line, text_key)


def read_parquet(
    path: str,
    text_key: str,
    start: int = 0,
    end: int | None = None,
    meter: Meter | None = None,
) -> Iterator[str | Rejected]:
    """One document a row, its text in column `text_key`, of the row groups [start, end)."""
    meter = meter or Meter()
    with open_input(path, seekable=True) as file:
        try:
            table = pq.ParquetFile(file)
        except PARQUET_ERRORS as error:
            yield Rejected(f"not a readable parquet file: {_damage(error)}")
            return
        for group in range(start, table.num_row_groups if end is None else end):
            yield from _row_group(table, group, text_key, meter)


def read_text(
    path: str, compression: str | None = None, meter: Meter | None = None
) -> Iterator[str | Rejected]:
    """A whole file as one document."""
    try:
        with open_input(path) as file:
            data = _whole(file, compression, meter or Meter())
    except PermissionError:
        data = Rejected("no permission to read it")
    yield data if isinstance(data, Rejected) else decode(data.removeprefix(_BOM))


def decode(data: bytes) -> str | Rejected:
    """The text of UTF-8 bytes, unless it is empty."""
    try:
        return _not_empty(data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        where = f" on line {line}" if line > 1 else f" at byte {error.start}"
        return Rejected(f"not UTF-8: 0x{data[error.start]:02x}{where}")


def parse_json_line(line: bytes, text_key: str) -> str | Rejected:
    """The text of one line of jsonl."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        value = _parse_leniently(line)
        if isinstance(value, Rejected):
            return value
    if not isinstance(value, dict):
        return Rejected(f"a JSON {_JSON_NAMES[type(value)]}, not an object")
    if text_key not in value:
        keys = ", ".join(list(value)[:8])[:120] or "none"
        return Rejected(f"no key {text_key!r} (keys: {keys})")
    text = value[text_key]
    if not isinstance(text, str):
        return Rejected(f"{text_key!r} is a JSON {_JSON_NAMES[type(text)]}, not a string")
    return _not_empty(text)


def _parse_leniently(line: bytes):
    """What orjson refuses: either NaN and Infinity, which Python writes, or the reason why."""
    if not line.strip():
        return Rejected("empty line")
    text = decode(line)
    if isinstance(text, Rejected):
        return text
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Rejected("not Unicode: an unpaired surrogate (\\ud800 to \\udfff)")
    except (ValueError, RecursionError) as error:
        return Rejected(f"not JSON: {error}"[:200])
    return value


def _not_empty(text: str) -> str | Rejected:
    return Rejected("empty document") if not text or text.isspace() else text


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


def _plain(file, begin: int, end: int | None, meter: Meter) -> Iterator[bytes]:
    if begin or end is not None:
        file.seek(begin)
    left = float("inf") if end is None else end - begin
    while left > 0 and (block := file.read(int(min(_BLOCK, left)))):
        left -= len(block)
        meter.consumed += len(block)
        yield block


_DECOMPRESSORS: dict[str, Callable] = {
    "gzip": lambda: zlib.decompressobj(wbits=31),
    "zstd": lambda: zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj(),
}


def _decompressed(file, compression: str, meter: Meter) -> Iterator[bytes | Rejected]:
    """What can be read of a stream of one or many frames; ends with a `Rejected` if damaged."""
    decoder = None
    padding = b"\0" if compression == "gzip" else b""  # tapes pad files with zeros
    try:
        while block := file.read(_BLOCK):
            for start in range(0, len(block), _PIECE):
                piece = block[start : start + _PIECE]
                meter.consumed += len(piece)
                while piece:
                    if decoder is None:
                        piece = piece.lstrip(padding)
                        decoder = _DECOMPRESSORS[compression]() if piece else None
                        continue
                    yield decoder.decompress(piece)
                    piece = decoder.unused_data if decoder.eof else b""
                    decoder = None if decoder.eof else decoder
    except (zlib.error, zstandard.ZstdError) as error:
        yield Rejected(f"{compression} stream damaged, the rest of the file is lost: {error}")
        return
    if decoder is not None:
        yield Rejected(f"{compression} stream cut short, the rest of the file is lost")


def _lines(blocks: Iterator[bytes | Rejected]) -> Iterator[bytes | Rejected]:
    """Cuts blocks into lines; a line beyond MAX_DOCUMENT_BYTES becomes one `Rejected`."""
    held: list[bytes] = []
    size = 0
    for block in blocks:
        if isinstance(block, Rejected):  # what is held is the first part of a lost line
            yield block
            return
        first, *others = block.split(b"\n")
        size += len(first)
        held = [*held, first] if size <= MAX_DOCUMENT_BYTES else []
        if others:
            yield _too_long() if size > MAX_DOCUMENT_BYTES else b"".join(held)
            yield from others[:-1]
            held, size = [others[-1]], len(others[-1])
    if size:
        yield _too_long() if size > MAX_DOCUMENT_BYTES else b"".join(held)


def _whole(file, compression: str | None, meter: Meter) -> bytes | Rejected:
    blocks = _decompressed(file, compression, meter) if compression else None
    pieces, size = [], 0
    for block in blocks or _plain(file, 0, None, meter):
        if isinstance(block, Rejected):
            return block
        if size < _HEAD and b"\0" in block[:_HEAD]:  # before reading on: libraries are large
            return Rejected("binary, not text")
        pieces.append(block)
        size += len(block)
        if size > MAX_DOCUMENT_BYTES:
            return _too_long(" (if it holds one JSON document a line, pass --format jsonl)")
    return b"".join(pieces)


def _too_long(hint: str = "") -> Rejected:
    limit = MAX_DOCUMENT_BYTES >> 20
    return Rejected(f"longer than {limit} MiB; split it into smaller documents{hint}")


def _row_group(
    table: pq.ParquetFile, group: int, text_key: str, meter: Meter
) -> Iterator[str | Rejected]:
    """Every row of a row group, each either a text or the reason why it is none."""
    info = table.metadata.row_group(group)
    before, done = meter.consumed, 0
    try:
        rest = _no_text_column(table.schema_arrow, text_key)
        options = {"row_groups": [group], "columns": [text_key]}
        for batch in table.iter_batches(_PARQUET_ROWS, **options) if rest is None else ():
            column = batch.column(0)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            # Arrow does not promise that strings are UTF-8: take the bytes and look.
            for cell in column.cast(pa.large_binary()).to_pylist():
                if cell is None:
                    yield Rejected(f"{text_key!r} is null")
                else:
                    yield decode(cell) if len(cell) <= MAX_DOCUMENT_BYTES else _too_long()
            done += len(column)
            meter.consumed = before + info.total_byte_size * done // max(info.num_rows, 1)
    except PARQUET_ERRORS as error:
        rest = Rejected(f"row group {group} damaged: {_damage(error)}")
    for _ in range(done, info.num_rows):
        yield rest
    meter.consumed = before + info.total_byte_size


def _no_text_column(schema: pa.Schema, text_key: str) -> Rejected | None:
    """Why no row has a text; None where column `text_key` holds texts."""
    if text_key not in schema.names:
        return Rejected(f"no column {text_key!r} (columns: {', '.join(schema.names)[:120]})")
    kind = schema.field(text_key).type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if values not in _TEXT_TYPES:
        return Rejected(f"column {text_key!r} holds {kind}, not strings")
    return None


def _damage(error: Exception) -> str:
    """The message of an error about the file's contents; any other error is raised again.

    pyarrow reports damage as ArrowException, or as a bare OSError without a number. What comes
    from below it, the disk or the network, keeps its own type or its errno.
    """
    bare = type(error) is OSError and error.errno is None
    if not bare and not isinstance(error, pa.ArrowException | UnicodeDecodeError):
        raise error
    return str(error).splitlines()[0][:200]
