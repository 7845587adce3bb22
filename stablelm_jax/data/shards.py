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
import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import struct
from collections.abc import Sequence
from typing import Self

import numpy as np

from stablelm_jax.data.token_file import ShardError, TokenFile, shard_error
from stablelm_jax.storage.files import replacing
from stablelm_jax.storage.remote import RemotePath

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_INT32_CODE = 4


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    """What the manifest says of a shard; `file`, `bytes` and `sha256` are those of the `.bin`."""

    file: str
    documents: int
    tokens: int
    bytes: int
    sha256: str

    def compare(self, path: pathlib.Path | RemotePath, **found: int | str) -> None:
        """Raises ShardError where a field has another value than was `found` at `path`."""
        for name, value in found.items():
            if value != getattr(self, name):
                what = f"sha256 {value}" if name == "sha256" else f"{value} {name}"
                raise ShardError(
                    f"{path}: {what} where the manifest says {getattr(self, name)};"
                    " restore the file or prepare the source again"
                )


def file_sha256(path: str | os.PathLike) -> str:
    """Hexadecimal sha256 of a whole file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardWriter:
    """Writes one shard, aside, and gives it its name when closed; `info` then describes it.

    As a context manager it closes at the end, and leaving it by an exception deletes what was
    written. Files are not flushed to the disk before the rename. A machine that loses its power may
    lose the newest shards, but the usual file systems record a size only once its data is written,
    so the byte counts of the manifest show it.
    """

    def __init__(self, path: str | os.PathLike):
        """`path`: with the suffix of either file, or without."""
        self._bin = pathlib.Path(path).with_suffix(".bin")
        self._idx = self._bin.with_suffix(".idx")
        self._files = contextlib.ExitStack()  # left in reverse order: the index gets its name last
        self._index_aside = self._files.enter_context(replacing(self._idx))
        tokens_aside = self._files.enter_context(replacing(self._bin))
        self._file = self._files.enter_context(open(tokens_aside, "wb", buffering=1 << 20))
        self._sha256 = hashlib.sha256()
        self._lengths = array.array("i")
        self.info: ShardInfo | None = None

    def add_many(self, flat_tokens: np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        """Appends documents that lie one after the other in `flat_tokens`, `lengths` tokens each.

        A document includes its `<|endoftext|>` and so is never empty; ids lie in [0, 2**31).
        """
        lengths = np.asarray(lengths, np.int32)
        assert flat_tokens.ndim == 1 and np.issubdtype(flat_tokens.dtype, np.integer)
        assert 0 <= flat_tokens.min(initial=0) <= flat_tokens.max(initial=0) < 2**31
        assert lengths.min(initial=1) > 0 and lengths.sum(dtype=np.int64) == len(flat_tokens)
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
            tokens, sha256 = int(lengths.sum(dtype=np.int64)), self._sha256.hexdigest()
            self.info = ShardInfo(self._bin.name, len(lengths), tokens, 4 * tokens, sha256)
        return self.info

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


class Shard(TokenFile):
    """A shard for reading. Opening it checks header and sizes; `check` checks the whole index.

    Its `path` is that of the `.bin`. `num_tokens`, `num_sequences` and `num_documents` are counts.
    """

    def __init__(self, path: str | os.PathLike):
        """`path`: with the suffix of either file, or without."""
        super().__init__(pathlib.Path(path).with_suffix(".bin"))
        self._idx = self.path.with_suffix(".idx")
        try:
            with open(self._idx, "rb") as file:
                header = file.read(_HEADER.size)
            index_size, size = self._idx.stat().st_size, self.path.stat().st_size
        except OSError as error:
            raise shard_error(error.filename or self._idx, error) from error
        self.dtype = self._read_header(header, index_size)
        self.num_tokens = size // self.dtype.itemsize
        self._map_index(size)

    def _read_header(self, header: bytes, index_size: int) -> np.dtype:
        if len(header) < _HEADER.size or header[:9] != _MAGIC:
            raise ShardError(f"{self._idx}: not an index of token shards (wrong first bytes)")
        _, version, code, self.num_sequences, offsets = _HEADER.unpack(header)
        if version != _VERSION or code not in _DTYPES:
            raise ShardError(
                f"{self._idx}: version {version}, token type {code}; only version {_VERSION} and"
                " integers are read: prepare the source again"
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

    def _map_index(self, size: int) -> None:
        """Maps the index and compares the `size` of the `.bin` with its last entries."""
        index = np.memmap(self._idx, np.uint8, "r", _HEADER.size).view(np.ndarray)
        starts_at, documents_at = 4 * self.num_sequences, 12 * self.num_sequences
        end = documents_at + 8 * (self.num_documents + 1)
        self._sequence_lengths = index[:starts_at].view("<i4")
        self._sequence_starts = index[starts_at:documents_at].view("<i8")
        self._document_index = index[documents_at:end].view("<i8")
        expected = 0
        if self.num_sequences:
            last = int(self._sequence_lengths[-1])
            expected = int(self._sequence_starts[-1]) + last * self.dtype.itemsize
        if size != expected:
            raise ShardError(
                f"{self.path}: {size} bytes where its index asks for {expected};"
                " the file is damaged, write it again"
            )
        if self._document_index[-1] != self.num_sequences:
            raise ShardError(f"{self._idx}: the documents do not cover all sequences")

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
