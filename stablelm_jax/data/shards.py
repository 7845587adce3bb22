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
"""

from __future__ import annotations

import array
import collections
import dataclasses
import errno
import functools
import hashlib
import os
import pathlib
import random
import struct
import threading
import time
import weakref
from typing import ClassVar, Self

import numpy as np
from absl import logging

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_INT32_CODE = 4
_INT32_MAX = 2**31 - 1
# Far below the usual limit of 1024 open files a process, yet enough that a pod host, which sees
# few shards at a time, seldom opens a file twice.
_MAX_OPEN_FILES = 512
# Seconds before each new try of a read, 15 in all: a network mount has waited by its own rules
# before it gives an error at all.
_WAITS = (1.0, 2.0, 4.0, 8.0)
# What a read through a network mount may meet for a moment. NFS gives EIO, ETIMEDOUT or EREMOTEIO
# where the server is silent for long (`soft`) and ESTALE after it began anew; a store mounted
# through FUSE gives EIO for whatever the store answers, ENOTCONN while its process is down; Lustre
# gives EAGAIN and ESHUTDOWN after it shut a client out; SMB passes on the errors of its socket. A
# failing disk says EIO too: 15 seconds later the error is the same.
_MAY_PASS = {
    getattr(errno, name)
    for name in """
        EIO ESTALE ETIMEDOUT EREMOTEIO EAGAIN ENOTCONN ESHUTDOWN ECONNRESET ECONNABORTED
        ECONNREFUSED EPIPE EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH
    """.split()
    if hasattr(errno, name)  # macOS lacks EREMOTEIO
}


class ShardError(ValueError):
    """A shard that is missing, damaged or of a kind we do not read; the message names the file."""


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    """What the manifest keeps of a shard. `file` is the `.bin`'s name; bytes and sha256 are its."""

    file: str
    documents: int
    tokens: int
    bytes: int
    sha256: str


def bin_path(path: str | os.PathLike) -> pathlib.Path:
    """The `.bin` of a shard given by its stem, its `.bin` or its `.idx`."""
    path = pathlib.Path(path)
    stem = path.name[:-4] if path.name.endswith((".bin", ".idx")) else path.name
    return path.with_name(stem + ".bin")


def idx_path(path: str | os.PathLike) -> pathlib.Path:
    """The `.idx` of a shard given by its stem, its `.bin` or its `.idx`."""
    path = bin_path(path)
    return path.with_name(path.name[:-4] + ".idx")


def file_sha256(path: str | os.PathLike) -> str:
    """Hexadecimal sha256 of a whole file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardWriter:
    """Writes one shard, aside, and gives it its name when closed.

    Use as a context manager: leaving it by an exception deletes what was written. After `close`,
    `info` describes the shard.

    Files are not flushed to the disk before the rename: a machine that loses its power may lose
    the newest shards, but the usual file systems record a size only once its data is written, so
    the byte counts of the manifest show it.
    """

    def __init__(self, path_without_suffix: str | os.PathLike):
        self._bin = bin_path(path_without_suffix)
        self._idx = idx_path(path_without_suffix)
        self._partial = self._bin.with_name(self._bin.name + ".partial")
        self._file = open(self._partial, "wb", buffering=1 << 20)  # noqa: SIM115 (closed by close)
        self._sha256 = hashlib.sha256()
        self._lengths = array.array("i")
        self.tokens = 0
        self.info: ShardInfo | None = None

    @property
    def documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def add(self, document: np.ndarray) -> None:
        """Appends one document: a flat array of token ids, its `<|endoftext|>` included."""
        document = np.asarray(document)
        self.add_many(document, [len(document)])

    def add_many(self, flat_tokens: np.ndarray, lengths) -> None:
        """Appends documents that lie one after the other in `flat_tokens`, `lengths` tokens each.

        Raises:
          ValueError: a token that is no integer in [0, 2**31), an empty document, or lengths that
            do not add up to the number of tokens.
        """
        flat_tokens = _as_int32(flat_tokens, self._bin)
        lengths = np.asarray(lengths, np.int64)
        self._check_lengths(lengths, len(flat_tokens))
        data = memoryview(flat_tokens).cast("B")
        self._file.write(data)
        self._sha256.update(data)
        self._lengths.frombytes(lengths.astype("<i4").tobytes())
        self.tokens += len(flat_tokens)

    def _check_lengths(self, lengths: np.ndarray, tokens: int) -> None:
        if len(lengths) and lengths.min() < 1:
            raise ValueError(f"{self._bin}: an empty document; leave it out, it has no token")
        if lengths.sum() != tokens:
            raise ValueError(
                f"{self._bin}: document lengths add up to {lengths.sum()} for {tokens} tokens;"
                " give one length a document"
            )

    def close(self) -> ShardInfo:
        """Writes the index, gives both files their names, and returns what the manifest needs."""
        if self.info is not None:
            return self.info
        self._file.close()
        partial_idx = self._idx.with_name(self._idx.name + ".partial")
        partial_idx.write_bytes(_index_bytes(np.frombuffer(self._lengths, np.int32)))
        # An older shard's index must not be found beside the new tokens.
        self._idx.unlink(missing_ok=True)
        os.replace(self._partial, self._bin)
        os.replace(partial_idx, self._idx)
        self.info = ShardInfo(
            self._bin.name, self.documents, self.tokens, 4 * self.tokens, self._sha256.hexdigest()
        )
        return self.info

    def abort(self) -> None:
        """Deletes what was written so far."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type, exc_value, traceback) -> None:
        if exc_type is None:
            self.close()
        elif self.info is None:
            self.abort()


def _as_int32(tokens, path: pathlib.Path) -> np.ndarray:
    tokens = np.asarray(tokens)
    if not np.issubdtype(tokens.dtype, np.integer) or tokens.ndim != 1:
        raise ValueError(
            f"{path}: tokens must be a flat array of integers,"
            f" not {tokens.dtype} of shape {tokens.shape}"
        )
    if len(tokens) and (tokens.min() < 0 or tokens.max() > _INT32_MAX):
        raise ValueError(f"{path}: token ids must lie in [0, 2**31)")
    return np.ascontiguousarray(tokens, "<i4")


def _index_bytes(lengths: np.ndarray) -> bytes:
    starts = np.zeros(len(lengths), "<i8")
    np.cumsum(lengths[:-1], dtype="<i8", out=starts[1:])
    header = _HEADER.pack(_MAGIC, _VERSION, _INT32_CODE, len(lengths), len(lengths) + 1)
    documents = np.arange(len(lengths) + 1, dtype="<i8")
    return b"".join(
        [header, lengths.astype("<i4").tobytes(), (4 * starts).tobytes(), documents.tobytes()]
    )


class TokenFile:
    """A file of nothing but tokens, for reading.

    Attributes:
      path: the file.
      dtype: type of the tokens in it.
    """

    _open_lock: ClassVar[threading.Lock] = threading.Lock()
    _opened: ClassVar[collections.deque[weakref.ref]] = collections.deque()

    def __init__(self, path: pathlib.Path, dtype: np.dtype):
        self.path, self.dtype = path, dtype
        self._file: _File | None = None

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as a fresh int32 array; 0 <= start <= stop <= tokens.

        Reads with pread and not through the map: a file cut short or a failing disk becomes an
        error that names the file, where a map would end the process with SIGBUS, and the memory
        of the process stays flat. Measured equal in speed for rows of 16 kB. Thread-safe.

        What fails in a way that may pass, as files behind a network do, is tried again for up to
        15 seconds (`_MAY_PASS`, `_WAITS`), with a warning in the log.

        Raises:
          ShardError: the file is missing, cut short, or still cannot be read.
        """
        tokens = np.empty(stop - start, self.dtype)
        try:
            file = self._file or self._open()
            size = _read_into(tokens, file.descriptor, start * self.dtype.itemsize)
        except OSError as error:
            size = self._read_again(tokens, start * self.dtype.itemsize, error)
        if size != tokens.nbytes:
            raise ShardError(
                f"{self.path}: ends before token {stop}; the file was cut short after it was"
                " opened, restore it or prepare the source again"
            )
        return tokens if self.dtype == np.int32 else tokens.astype(np.int32)

    def _read_again(self, tokens: np.ndarray, offset: int, error: OSError) -> int:
        """What `_read_into` gives, after `error`, once it does; ShardError where it does not."""
        if error.errno in _MAY_PASS:  # once a read, not once a try
            patience = f"trying again for up to {sum(_WAITS):.0f} seconds"
            logging.warning("%s: cannot be read (%s); %s", self.path, error.strerror, patience)
        tries = 1
        for wait in _WAITS:
            if error.errno not in _MAY_PASS:
                break
            time.sleep(wait * random.uniform(0.5, 1.0))  # the threads must not come back as one
            tries += 1
            try:
                # A stale handle, or one of a mount that is gone, stays so. `file` holds the new one
                # while it is read: another thread may put its own in `_file`.
                file = self._open()
                return _read_into(tokens, file.descriptor, offset)
            except OSError as again:
                error = again.with_traceback(None)  # which would keep `file` open, in a cycle
        raise _shard_error(self.path, error, tries) from error

    def _open(self) -> _File:
        """Opens the file; when many are open, the shard that was first gives up its own."""
        self._file = file = _File(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
        with TokenFile._open_lock:
            TokenFile._opened.append(weakref.ref(self))
            while len(TokenFile._opened) > _MAX_OPEN_FILES:
                oldest = TokenFile._opened.popleft()()
                if oldest is not None:
                    oldest._file = None
        return file


class Shard(TokenFile):
    """A shard for reading. Opening it checks header and sizes; `check` checks the whole index.

    Attributes:
      path: the `.bin` file.
      dtype: type of the tokens on disk.
      num_tokens, num_sequences, num_documents: counts.
    """

    def __init__(self, path: str | os.PathLike):
        self._idx = idx_path(path)
        try:
            with open(self._idx, "rb") as file:
                header = file.read(_HEADER.size)
            dtype = self._read_header(header, self._idx.stat().st_size)
        except OSError as error:
            raise _shard_error(self._idx, error) from error
        super().__init__(bin_path(path), dtype)
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise _shard_error(self.path, error) from error
        self._check_size(size)
        self.num_tokens = size // self.dtype.itemsize

    def _read_header(self, header: bytes, index_size: int) -> np.dtype:
        if len(header) < _HEADER.size or header[:9] != _MAGIC:
            raise ShardError(f"{self._idx}: not an index of token shards (wrong first bytes)")
        _, version, code, self.num_sequences, offsets = _HEADER.unpack(header)
        if version != _VERSION:
            raise ShardError(f"{self._idx}: version {version}; only version 1 is known")
        if code not in _DTYPES:
            raise ShardError(
                f"{self._idx}: token type {code} is not an integer; prepare the source again"
            )
        self.num_documents = offsets - 1
        expected = _HEADER.size + 12 * self.num_sequences + 8 * offsets
        # Shards of several modalities end with one more byte a sequence, which means nothing here.
        if offsets < 1 or index_size not in (expected, expected + self.num_sequences):
            raise ShardError(
                f"{self._idx}: {index_size} bytes where its header asks for {expected};"
                " the file is damaged, write it again"
            )
        return np.dtype(_DTYPES[code])

    def _check_size(self, size: int) -> None:
        expected = 0
        if self.num_sequences:
            last = int(self.sequence_lengths[-1])
            expected = int(self._sequence_starts[-1]) + last * self.dtype.itemsize
        if size != expected:
            raise ShardError(
                f"{self.path}: {size} bytes where its index asks for {expected};"
                " the file is damaged, write it again"
            )
        if self._document_index[-1] != self.num_sequences:
            raise ShardError(f"{self._idx}: the documents do not cover all sequences")

    @functools.cached_property
    def _index(self) -> np.ndarray:
        return np.memmap(self._idx, np.uint8, "r", _HEADER.size).view(np.ndarray)

    def _index_part(self, dtype: str, offset: int, count: int) -> np.ndarray:
        return self._index[offset : offset + count * np.dtype(dtype).itemsize].view(dtype)

    @functools.cached_property
    def sequence_lengths(self) -> np.ndarray:
        """int32 [sequences], tokens of each sequence as stored."""
        return self._index_part("<i4", 0, self.num_sequences)

    @functools.cached_property
    def _sequence_starts(self) -> np.ndarray:
        return self._index_part("<i8", 4 * self.num_sequences, self.num_sequences)

    @functools.cached_property
    def _document_index(self) -> np.ndarray:
        return self._index_part("<i8", 12 * self.num_sequences, self.num_documents + 1)

    @functools.cached_property
    def document_offsets(self) -> np.ndarray:
        """int64 [documents + 1]: document d is tokens[offsets[d]:offsets[d + 1]]."""
        ends = np.zeros(self.num_sequences + 1, np.int64)
        np.cumsum(self.sequence_lengths, dtype=np.int64, out=ends[1:])
        return ends[self._document_index]

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64 [documents], tokens of each document."""
        return np.diff(self.document_offsets)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """All tokens, flat, memory-mapped, in the type on disk (int32 for shards of ours)."""
        if not self.num_tokens:
            return np.zeros(0, self.dtype)
        return np.memmap(self.path, self.dtype, "r").view(np.ndarray)

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document."""
        return self.tokens[self.document_offsets[index] : self.document_offsets[index + 1]]

    def check(self) -> None:
        """Reads the whole index and raises ShardError where it contradicts itself."""
        starts = np.zeros(self.num_sequences, np.int64)
        np.cumsum(self.sequence_lengths[:-1], dtype=np.int64, out=starts[1:])
        if not np.array_equal(starts * self.dtype.itemsize, self._sequence_starts):
            raise ShardError(f"{self._idx}: sequences do not lie one after the other")
        if (np.diff(self._document_index) < 0).any() or (self.sequence_lengths < 0).any():
            raise ShardError(f"{self._idx}: a document or a sequence of negative length")


class _File:
    """A file descriptor that closes when the last reader lets go of it."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self):
        os.close(self.descriptor)


def _read_into(array: np.ndarray, descriptor: int, offset: int) -> int:
    """Fills `array` from byte `offset` of a file; returns the bytes read, fewer at its end."""
    size = os.preadv(descriptor, [array], offset)
    while 0 < size < array.nbytes:  # interrupted by a signal, or more than 2 GiB
        more = os.preadv(descriptor, [memoryview(array).cast("B")[size:]], offset + size)
        if not more:
            break
        size += more
    return size


def _shard_error(path: pathlib.Path, error: OSError, tries: int = 1) -> ShardError:
    if isinstance(error, FileNotFoundError):
        return ShardError(f"{path}: missing; restore it or prepare the source again")
    reason = error.strerror or error
    if tries == 1:
        return ShardError(f"{path}: cannot be read ({reason})")
    return ShardError(
        f"{path}: cannot be read ({reason}), tried {tries} times; look at the disk or the mount it"
        " lies on, or copy the data elsewhere, and run the same command again"
    )
