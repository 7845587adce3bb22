"""Token shards: the indexed files of Megatron-LM and GPT-NeoX, a `.bin` and an `.idx` side by side.

The `.bin` holds nothing but tokens, one after the other. The `.idx` is little-endian:

    9 bytes   magic `MMIDIDX`, two zero bytes
    uint64    version, 1
    uint8     code of the token type (4 is int32)
    uint64    sequences S
    uint64    length of the document index, documents + 1
    int32[S]  tokens of each sequence
    int64[S]  byte at which each sequence starts in the `.bin`
    int64[]   sequence at which each document starts; the last entry is S

We write int32 tokens and one sequence a document. We read every integer type, and documents of
several sequences, because other tools write those.

Beside a shard of conversations lies `<stem>.spans.npy`, int32 [spans, 3]: which of its tokens are
trained. A span is (document of the shard, its first token, the token after its last), the tokens
counted within the document; spans are sorted. Of pairs, documents 2p and 2p + 1 are the chosen and
the rejected side of the p-th pair of the shard.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import struct
from collections.abc import Sequence
from typing import Self

import numpy as np
from absl import logging

from stablelm_jax.storage.files import replacing
from stablelm_jax.storage.remote import RemotePath, may_pass, retry

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_INT32_CODE, _INT32 = 4, np.dtype("<i4")  # what we write


class ShardError(ValueError):
    """A shard that is missing, damaged or of a kind we do not read; the message names the file."""


def shard_error(path: pathlib.Path | RemotePath, error: OSError) -> ShardError:
    """What the system says of a file of a shard, as an error that names the file and a remedy."""
    if isinstance(error, FileNotFoundError):
        return ShardError(f"{path}: missing; restore it or prepare the source again")
    # Behind a URL it may be an error of the cache, whose file is named in the whole message alone.
    said = error if isinstance(path, RemotePath) else error.strerror or error
    remedy = ""
    if error.errno is not None and may_pass(error):  # errors of a store have no number
        remedy = (
            "; look at the disk or the mount it lies on, or copy the data elsewhere, and run the"
            " same command again"
        )
    return ShardError(f"{path}: cannot be read ({said}){remedy}")


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    """What the manifest says of a shard; `file`, `bytes` and `sha256` are those of the `.bin`."""

    file: str
    documents: int
    tokens: int
    bytes: int
    sha256: str
    spans_sha256: str = ""  # of the file of spans; none lies beside a shard of text

    def compare(self, path: pathlib.Path | RemotePath, **found: int | str) -> None:
        """Raises ShardError where a field has another value than was `found` at `path`."""
        for name, value in found.items():
            if value != getattr(self, name):
                what = f"sha256 {value}" if name.endswith("sha256") else f"{value} {name}"
                raise ShardError(
                    f"{path}: {what} where the manifest says {getattr(self, name)};"
                    " restore the file or prepare the source again"
                )


def file_sha256(path: str | os.PathLike) -> str:
    """Hexadecimal sha256 of a whole file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def spans_path(path: pathlib.Path | RemotePath) -> pathlib.Path | RemotePath:
    """The file of spans that belongs to the `.bin` at `path`."""
    return path.parent / f"{path.name.removesuffix('.bin')}.spans.npy"


def read_spans(path: pathlib.Path | RemotePath, info: ShardInfo) -> np.ndarray:
    """The trained spans of the shard whose `.bin` is `path`: int32 [spans, 3], see above.

    Raises ShardError where the file of spans is missing or not the one that the manifest names.
    """
    sidecar = spans_path(path)
    try:
        data = sidecar.read_bytes()
    except OSError as error:
        raise shard_error(sidecar, error) from error
    info.compare(sidecar, spans_sha256=hashlib.sha256(data).hexdigest())
    return np.load(io.BytesIO(data), allow_pickle=False)


class ShardWriter:
    """Writes one shard, aside, and gives it its name when closed; `info` then describes it.

    `path` is that of the `.bin`; its suffix may be missing. As a context manager it closes at the
    end, and leaving it by an exception deletes what was written. Files are not flushed to the disk
    before the rename. A machine that loses its power may lose the newest shards, but the usual file
    systems record a size only once its data is written, so the byte counts of the manifest show it.
    """

    def __init__(self, path: str | os.PathLike):
        self._bin = pathlib.Path(path).with_suffix(".bin")
        self._idx = self._bin.with_suffix(".idx")
        self._files = contextlib.ExitStack()  # left in reverse order: the index gets its name last
        self._index_aside = self._files.enter_context(replacing(self._idx))
        tokens_aside = self._files.enter_context(replacing(self._bin))
        self._file = self._files.enter_context(open(tokens_aside, "wb", buffering=1 << 20))
        self._sha256 = hashlib.sha256()
        self._lengths = array.array("i")
        self._spans: list[np.ndarray] = []
        self.info: ShardInfo | None = None

    def add_many(
        self,
        flat_tokens: np.ndarray,
        lengths: Sequence[int] | np.ndarray,
        spans: np.ndarray | None = None,
    ) -> None:
        """Appends documents that lie one after the other in `flat_tokens`, `lengths` tokens each.

        A document includes its `<|endoftext|>` and so is never empty; ids lie in [0, 2**31).
        `spans` [N, 3] says what of them is trained, their documents counted from the first of this
        call on; it is given in each call of a shard, or in none.
        """
        lengths = np.asarray(lengths, np.int32)
        assert flat_tokens.ndim == 1 and np.issubdtype(flat_tokens.dtype, np.integer)
        assert 0 <= flat_tokens.min(initial=0) <= flat_tokens.max(initial=0) < 2**31
        assert lengths.min(initial=1) > 0 and lengths.sum(dtype=np.int64) == len(flat_tokens)
        if spans is not None:
            documents, first, last = spans.T
            assert 0 <= documents.min(initial=0) <= documents.max(initial=0) < len(lengths)
            assert (
                (0 <= first).all() and (first < last).all() and (last <= lengths[documents]).all()
            )
            self._spans.append(spans + [len(self._lengths), 0, 0])
        data = memoryview(np.ascontiguousarray(flat_tokens, "<i4")).cast("B")
        self._file.write(data)
        self._sha256.update(data)
        self._lengths.frombytes(lengths.tobytes())

    def close(self) -> ShardInfo:
        """Writes the index, gives both files their names, and returns what the manifest needs."""
        if self.info is None:
            lengths = np.frombuffer(self._lengths, np.int32)
            with self._files:
                self._index_aside.write_bytes(_index_bytes(lengths))
                # An older shard's index must not be found beside the new tokens.
                self._idx.unlink(missing_ok=True)
                spans_sha256 = self._write_spans() if self._spans else ""
            tokens, sha256 = int(lengths.sum(dtype=np.int64)), self._sha256.hexdigest()
            counts = len(lengths), tokens, 4 * tokens
            self.info = ShardInfo(self._bin.name, *counts, sha256, spans_sha256)
        return self.info

    def _write_spans(self) -> str:
        """Writes the file of spans; returns its sha256."""
        file = io.BytesIO()
        np.save(file, np.concatenate(self._spans).astype("<i4"))
        with replacing(spans_path(self._bin)) as aside:
            aside.write_bytes(file.getvalue())
        return hashlib.sha256(file.getvalue()).hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info) -> None:
        if exc_info[0] is None:
            self.close()
        else:
            self._files.__exit__(*exc_info)


def _index_bytes(lengths: np.ndarray) -> bytes:
    header = _HEADER.pack(_MAGIC, _VERSION, _INT32_CODE, len(lengths), len(lengths) + 1)
    starts = 4 * (np.cumsum(lengths, dtype="<i8") - lengths)
    documents = np.arange(len(lengths) + 1, dtype="<i8")
    return header + lengths.astype("<i4").tobytes() + starts.tobytes() + documents.tobytes()


def read_tokens(path: pathlib.Path, start: int, stop: int, dtype: np.dtype = _INT32) -> np.ndarray:
    """Tokens [start, stop) of a file of nothing but tokens, as a fresh int32 array. Thread-safe.

    Reads with pread and not through a map: a file cut short or a failing disk becomes a ShardError
    that names the file, where a map would end the process with SIGBUS, and the memory of the
    process stays flat. The file is opened for each read, 8 us beside the 10 us that a row of 16 kB
    takes, so a run of thousands of shards needs no limit of open files.

    A network mount may come back, so most errors are tried again for 15 seconds: NFS gives EIO or
    ETIMEDOUT where its server is silent and ESTALE after it began anew, FUSE gives ENOTCONN while
    its process is down, Lustre ESHUTDOWN, SMB the errors of its socket.
    """
    tokens = np.empty(stop - start, dtype)

    def read() -> int:
        rest, offset = tokens.view(np.uint8), start * dtype.itemsize
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Again where a signal interrupts it, or past 2 GiB.
            while len(rest) and (size := os.preadv(descriptor, [rest], offset)):
                rest, offset = rest[size:], offset + size
        finally:
            os.close(descriptor)
        return len(rest)

    def warn(error: OSError) -> None:
        message = "%s: cannot be read (%s); trying again for up to 15 seconds"
        logging.warning(message, path, error.strerror)

    try:
        missing = retry(read, warn)
    except OSError as error:
        raise shard_error(path, error) from error
    if missing:
        raise ShardError(
            f"{path}: ends before token {stop}; it was cut short after it was opened,"
            " restore it or prepare the source again"
        )
    return tokens if dtype == np.int32 else tokens.astype(np.int32)


class ShardIndex:
    """The `.idx` of a shard: where its documents lie."""

    def __init__(self, path: pathlib.Path | RemotePath, data: np.ndarray):
        """`data`: the bytes of the file, uint8. ShardError: they are no index."""
        self._idx, header = path, data[: _HEADER.size].tobytes()
        if len(header) < _HEADER.size or header[:9] != _MAGIC:
            raise ShardError(f"{path}: not an index of token shards (wrong first bytes)")
        _, version, code, self.num_sequences, offsets = _HEADER.unpack(header)
        if version != _VERSION or code not in _DTYPES:
            raise ShardError(
                f"{path}: version {version}, token type {code}; only version {_VERSION} and"
                " integers are read: prepare the source again"
            )
        self.dtype, self.num_documents = np.dtype(_DTYPES[code]), offsets - 1
        expected = _HEADER.size + 12 * self.num_sequences + 8 * offsets
        # Shards of several modalities end with one more byte a sequence, which means nothing here.
        if offsets < 1 or len(data) not in (expected, expected + self.num_sequences):
            raise ShardError(
                f"{path}: {len(data)} bytes where its header asks for {expected};"
                " the file is damaged, write it again"
            )
        parts = [4 * self.num_sequences, 12 * self.num_sequences]
        lengths, starts, documents = np.split(data[_HEADER.size : expected], parts)
        self._sequence_lengths, self._sequence_starts = lengths.view("<i4"), starts.view("<i8")
        self._document_index = documents.view("<i8")
        if self._document_index[-1] != self.num_sequences:
            raise ShardError(f"{path}: the documents do not cover all sequences")
        last = starts.view("<i8")[-1:] + self.dtype.itemsize * lengths.view("<i4")[-1:]
        self.num_bytes = int(last.sum())  # of the `.bin`; 0 where there is no sequence

    @functools.cached_property
    def document_offsets(self) -> np.ndarray:
        """int64 [documents + 1]: document d is the tokens from offsets[d] to offsets[d + 1]."""
        return self._sequence_ends[self._document_index]

    @property
    def _sequence_ends(self) -> np.ndarray:
        """int64 [sequences + 1], in tokens; before the first sequence stands a 0."""
        return np.concatenate([[0], np.cumsum(self._sequence_lengths, dtype=np.int64)])

    def check(self) -> None:
        """Reads the whole index and raises ShardError where it contradicts itself."""
        starts = self._sequence_ends[:-1] * self.dtype.itemsize
        if not np.array_equal(starts, self._sequence_starts):
            raise ShardError(f"{self._idx}: sequences do not lie one after the other")
        if (np.diff(self._document_index) < 0).any() or (self._sequence_lengths < 0).any():
            raise ShardError(f"{self._idx}: a document or a sequence of negative length")


class Shard(ShardIndex):
    """A shard for reading. Opening it checks header and sizes; `check` checks the whole index."""

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path).with_suffix(".bin")
        index = self.path.with_suffix(".idx")
        try:
            data = np.memmap(index, np.uint8, "r") if index.stat().st_size else np.zeros(0, "u1")
            size = self.path.stat().st_size
        except OSError as error:
            raise shard_error(error.filename or index, error) from error
        super().__init__(index, data.view(np.ndarray))
        self.num_tokens = size // self.dtype.itemsize
        if size != self.num_bytes:
            raise ShardError(
                f"{self.path}: {size} bytes where its index asks for {self.num_bytes};"
                " the file is damaged, write it again"
            )

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as `read_tokens` gives them."""
        return read_tokens(self.path, start, stop, self.dtype)
