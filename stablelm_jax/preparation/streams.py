"""The bytes of an input in blocks: opened wherever it lies, decompressed, and turned into UTF-8.

Damage raises `Damaged` after the last block before it; a disk or a network that fails, its own.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import dataclasses
import functools
import io
import itertools
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

import fsspec
import lz4.frame
import zstandard

from stablelm_jax.preparation.finding import shown
from stablelm_jax.preparation.hub import PINNED, HubFile
from stablelm_jax.storage.remote import driver_options, is_http, is_url

# A longer document is refused: it has to fit into memory several times over in every worker.
MAX_DOCUMENT_BYTES = 128 * 2**20

_BLOCK = 1 << 16  # small: what is lost behind a damage is counted from the end of its block
# Damage in a compressed stream loses what the failing call would have returned: feed it little.
_PIECE = 4096
# Published dumps are written with `zstd --long=31`; the decoder has to be allowed such a window.
_WINDOW = 2**31
# Compressed text is a hundred times larger at most. What grows more is made to fill the machine.
_MOST_EXPANSION = 500
_ANY_EXPANSION_BYTES = 256 << 20
_MOST_LAYERS = 4


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A record that gives no document, and why; what it quotes of a file is made real text."""

    reason: str
    # As those of a `Noted` text.
    values: Mapping[str, str | None] | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "reason", shown(self.reason))


class Damaged(Exception):
    """The rest of a file cannot be read, for a reason that lies in it."""


def is_of_the_file(error: Exception) -> bool:
    """Whether an OSError is a library's, about what a file holds: those of a disk have a number."""
    return type(error) is OSError and error.errno is None


Blocks = Iterator[bytes]


def reason_kind(reason: str) -> str:
    """The part of a reason that is the same for many records, for counting."""
    return re.split(r"[:(]", reason)[0].strip()


def too_long(hint: str = "") -> Rejected:
    limit = MAX_DOCUMENT_BYTES >> 20
    return Rejected(f"longer than {limit} MiB; split it into smaller documents{hint}")


class Held:
    """The bytes of a document so far; of one that is too long they are let go."""

    def __init__(self):
        self.size, self._parts = 0, []

    def add(self, part: bytes) -> None:
        """Adds what follows."""
        self.size += len(part)
        if self.is_too_long:
            self._parts.clear()
        else:
            self._parts.append(part)

    @property
    def is_too_long(self) -> bool:
        return self.size > MAX_DOCUMENT_BYTES

    def take(self, hint: str = "") -> bytes | Rejected:
        """The whole of it; then a new one begins."""
        taken = too_long(hint) if self.is_too_long else b"".join(self._parts)
        self.__init__()
        return taken


@dataclasses.dataclass
class Meter:
    """Bytes of the input read so far, as they lie on disk: what progress is measured in."""

    consumed: int = 0


def open_input(path: str, *, seekable: bool = False, size: int | None = None):
    """A binary file from a local path or any fsspec URL, for a `with`; `size`: as it is listed."""
    if not is_url(path):
        return open(path, "rb")
    if PINNED.match(path):
        return HubFile(path, size)
    # A page that is read from start to end comes in one answer, also from servers without ranges.
    streamed = is_http(path) and not seekable
    return fsspec.open(
        path, "rb", **({"block_size": 0} if streamed else {}), **driver_options(path)
    )


def blocks_of(file, meter: Meter, begin: int = 0, end: int | None = None) -> Blocks:
    """The bytes [begin, end) of an open file."""
    if begin or end is not None:
        file.seek(begin)
    left = float("inf") if end is None else end - begin
    while left > 0 and (block := file.read(int(min(_BLOCK, left)))):
        left -= len(block)
        meter.consumed += len(block)
        yield block


def peek(blocks: Blocks, size: int) -> tuple[bytes, Blocks]:
    """The first `size` bytes, fewer only where there are no more, and the blocks as they were."""
    seen: list[bytes] = []
    length = 0
    try:
        while length < size and (block := next(blocks, None)) is not None:
            seen.append(block)
            length += len(block)
    except Damaged as error:
        blocks = _raising(error)
    return b"".join(seen)[:size], itertools.chain(seen, blocks)


def _raising(error: Exception) -> Blocks:
    raise error
    yield


def without_first(blocks: Blocks, count: int) -> Blocks:
    """All but the first `count` bytes."""
    for block in blocks:
        yield block[count:]
        count = max(count - len(block), 0)


@contextlib.contextmanager
def as_file(blocks: Blocks) -> Iterator[BinaryIO]:
    """Blocks as a file, which ends where damage begins; that is raised when the library ends."""
    raw = _BlockFile(blocks)
    try:
        yield io.BufferedReader(raw)
    except Exception as error:
        raise raw.damage or error from None
    if raw.damage:
        raise raw.damage


class _BlockFile(io.RawIOBase):
    def __init__(self, blocks: Blocks):
        self._blocks, self._held, self.damage = blocks, b"", None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            while not self._held and (block := next(self._blocks, None)) is not None:
                self._held = block
        except Damaged as error:
            self.damage = error
        count = min(len(buffer), len(self._held))
        buffer[:count], self._held = self._held[:count], self._held[count:]
        return count


# compression

# name: (how a stream begins, what decompresses it). zstd may begin with a frame to be skipped, as
# programs that compress in parallel write them.
_COMPRESSIONS: dict[str, tuple[bytes, Callable]] = {
    "gzip": (rb"\x1f\x8b\x08", lambda: zlib.decompressobj(wbits=31)),
    "zstd": (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", lambda: _zstd().decompressobj()),
    "xz": (rb"\xfd7zXZ\x00|\x5d\0\0[^\0]", lambda: lzma.LZMADecompressor(memlimit=_WINDOW)),
    "bzip2": (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", bz2.BZ2Decompressor),
    "lz4": (rb"\x04\x22\x4d\x18", lz4.frame.LZ4FrameDecompressor),
}
_zstd = functools.partial(zstandard.ZstdDecompressor, max_window_size=_WINDOW)
# What a decoder says of damage. bz2 raises OSError for it, which here comes from no disk.
_DECODER_ERRORS = (
    zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError, RuntimeError, ValueError, EOFError,
)  # fmt: skip


def compression_of(head: bytes) -> str | None:
    """The compression of a stream that begins like this."""
    found = (name for name, (begin, _) in _COMPRESSIONS.items() if re.match(begin, head))
    return next(found, None)


def unpacked(blocks: Blocks, named: str | None, meter: Meter) -> Blocks:
    """What lies below any layers of compression, which the first bytes tell.

    `named`: the compression that the file's name speaks of. Where the first bytes know of none the
    file is taken as it is, unless it is no text either.
    """
    is_compressed = False
    for _ in range(_MOST_LAYERS):
        head, blocks = peek(blocks, 512)
        found = compression_of(head)
        if found is None:
            break
        blocks, is_compressed, named = _decompressed(blocks, found), True, None
    if named and b"\0" in head:
        raise Damaged(f"{named} stream damaged, the rest of the file is lost: no {named} at all")
    return _bounded(blocks, meter) if is_compressed else blocks


def _decompressed(blocks: Blocks, compression: str) -> Blocks:
    """What can be read of a stream of one or many frames."""
    decoder = None
    padding = b"\0" if compression in ("gzip", "xz") else b""  # tapes pad files with zeros
    starts = ((block, start) for block in blocks for start in range(0, len(block), _PIECE))
    for block, start in starts:
        piece = block[start : start + _PIECE]
        while piece:
            if decoder is None:
                piece = piece.lstrip(padding)
                decoder = _COMPRESSIONS[compression][1]() if piece else None
                continue
            try:
                data = decoder.decompress(piece)
            except _DECODER_ERRORS as error:
                text = f"{compression} stream damaged, the rest of the file is lost: {error}"
                raise Damaged(text[:200]) from None
            yield data
            piece = decoder.unused_data or b"" if decoder.eof else b""
            decoder = None if decoder.eof else decoder
    if decoder is not None:
        raise Damaged(f"{compression} stream cut short, the rest of the file is lost")


def _bounded(blocks: Blocks, meter: Meter) -> Blocks:
    before, size = meter.consumed, 0
    for block in blocks:
        size += len(block)
        if expands_without_measure(meter.consumed - before, size):
            raise Damaged("grows without measure when decompressed, the rest of the file is lost")
        yield block


def expands_without_measure(compressed_bytes: int, expanded_bytes: int) -> bool:
    """Whether this is no text: made to fill the machine, or zeros."""
    return expanded_bytes > _ANY_EXPANSION_BYTES + _MOST_EXPANSION * compressed_bytes


# text

# Those of UTF-32 first: in part they look like those of UTF-16.
_BYTE_ORDER_MARKS = {
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


def as_utf8(blocks: Blocks) -> Blocks:
    """Text as UTF-8 without a byte order mark; what begins with one of UTF-16 or -32 is decoded."""
    head, blocks = peek(blocks, 4)
    named = (name for name, marks in _BYTE_ORDER_MARKS.items() if head.startswith(marks))
    encoding = next(named, None)
    if encoding is None:
        yield from without_first(blocks, 3 if head.startswith(codecs.BOM_UTF8) else 0)
        return
    try:
        for text in codecs.iterdecode(blocks, encoding):
            yield text.encode()
    except UnicodeDecodeError as error:
        text = f"not {encoding.upper()} as its byte order mark says, the rest of the file is lost"
        raise Damaged(f"{text}: {error.reason}") from None


def cut_at(blocks: Blocks, separator: bytes) -> Iterator[bytes | Rejected]:
    """Cuts blocks at each separator; a piece beyond MAX_DOCUMENT_BYTES becomes one `Rejected`."""
    held, tail = Held(), b""
    for block in blocks:
        *ended, rest = (tail + block).split(separator)
        for piece in ended:
            held.add(piece)
            yield held.take()
        # The end of a block may be the beginning of a separator.
        cut = max(len(rest) - len(separator) + 1, 0)
        held.add(rest[:cut])
        tail = rest[cut:]
    if held.size or tail:
        held.add(tail)
        yield held.take()
