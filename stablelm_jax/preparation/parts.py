"""Parts: what the workers of `prepare` leave behind for the assembly of shards.

A part holds up to PART_BYTES of text of one unit, tokenised: flat tokens and, beside them, the
lengths and the hash of each document, and what was rejected. It is a directory that gets its name
when it is whole, so a name means a finished part, whoever was killed and when, and even where two
workers made the same part.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import tempfile

import numpy as np

# Two seconds of tokenising: what a kill loses at most, for each worker.
PART_BYTES = 16 << 20


def content_hash(data: bytes) -> int:
    """64 bits of BLAKE2b of a document's UTF-8 text: says on which side of the split it falls."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@dataclasses.dataclass(frozen=True)
class PartInfo:
    """Counts of a part.

    records: of the unit, read up to the end of this part. consumed: bytes of the unit's files,
    likewise. last: nothing of the unit follows.
    """

    records: int
    consumed: int
    documents: int
    tokens: int
    text_bytes: int
    rejected: int
    last: bool


class PartWriter:
    """Collects one part; `close` gives it its name."""

    def __init__(self, directory: pathlib.Path, unit: int, number: int):
        self._final = part_path(directory, unit, number)
        self._scratch = pathlib.Path(tempfile.mkdtemp(prefix="scratch-", dir=directory))
        self._tokens = open(self._scratch / "tokens.bin", "wb")
        self._lengths: list[int] = []
        self._bytes: list[int] = []
        self._hashes: list[int] = []
        self._rejected: list[tuple[str, int, str]] = []
        self.text_bytes = 0

    def add(self, tokens: list[np.ndarray], encoded: list[bytes], eod: int) -> None:
        """Adds documents: their tokens without the one that ends them, and their UTF-8 text."""
        end = np.array([eod], np.int32)
        self._tokens.write(np.concatenate([piece for ids in tokens for piece in (ids, end)]))
        self._lengths += [len(ids) + 1 for ids in tokens]
        self._bytes += map(len, encoded)
        self._hashes += map(content_hash, encoded)
        self.text_bytes += sum(map(len, encoded))

    def reject(self, file: str, line: int, reason: str) -> None:
        """Notes a record that gives no document."""
        self._rejected.append((file, line, reason))

    def close(self, records: int, consumed: int, last: bool) -> None:
        """Makes the part visible, whole."""
        self._tokens.close()
        counts = (len(self._lengths), sum(self._lengths), self.text_bytes, len(self._rejected))
        info = PartInfo(records, consumed, *counts, last)
        np.savez(
            self._scratch / "documents.npz",
            lengths=np.array(self._lengths, np.int64),
            bytes=np.array(self._bytes, np.int64),
            hashes=np.array(self._hashes, np.uint64),
            rejected=_packed(self._rejected),
            info=_packed(dataclasses.asdict(info)),
        )
        try:
            os.rename(self._scratch, self._final)
        except OSError:
            if not self._final.is_dir():
                raise
            shutil.rmtree(self._scratch)  # somebody else made the same part first


@dataclasses.dataclass(frozen=True)
class Part:
    """A finished part, for reading."""

    path: pathlib.Path
    unit: int

    @functools.cached_property
    def info(self) -> PartInfo:
        return PartInfo(**_unpacked(self._field("info")))

    def tokens(self) -> np.ndarray:
        """Its documents one after the other, each with the token that ends it, int32 [tokens]."""
        if not self.info.tokens:  # an empty file cannot be mapped
            return np.zeros(0, np.int32)
        return np.memmap(self.path / "tokens.bin", np.int32, "r").view(np.ndarray)

    def lengths(self) -> np.ndarray:
        """Tokens of each document, the one that ends it included, int64 [documents]."""
        return self._field("lengths")

    def bytes(self) -> np.ndarray:
        """Bytes of each document's text, int64 [documents]."""
        return self._field("bytes")

    def hashes(self) -> np.ndarray:
        """Hash of each document's text, uint64 [documents]."""
        return self._field("hashes")

    def rejected(self) -> list[tuple[str, int, str]]:
        """(file, line, reason) of what gave no document; lines as `units.Record` counts them."""
        return _unpacked(self._field("rejected"))

    def _field(self, name: str) -> np.ndarray:
        with np.load(self.path / "documents.npz") as fields:
            return fields[name]


def _packed(value) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _unpacked(field: np.ndarray):
    return json.loads(field.tobytes())


def part_path(directory: pathlib.Path, unit: int, number: int) -> pathlib.Path:
    """Where a part lies; names sort as parts do."""
    return directory / f"{unit:08d}-{number:06d}"


def parts_of_unit(directory: pathlib.Path, unit: int) -> list[Part]:
    """The finished parts of a unit, in order."""
    found = []
    while (path := part_path(directory, unit, len(found))).is_dir():
        found.append(Part(path, unit))
    return found
