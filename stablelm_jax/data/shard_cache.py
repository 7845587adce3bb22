"""Shards behind a URL: fetched whole into a bounded folder of this machine, or read by range.

Rows are shuffled over a whole source, so every step needs a little of every shard. A cache that
let go of shards in use would fetch most of the data again every few rows. Here a shard that found
room keeps it until the process ends, and a shard that finds none is read by range. What this
process does not use gives way, the least recently used first.

FOLDER/
  <sha256>.bin          a shard, checked
  <sha256>.bin.partial  a shard on its way
  locks/                only one thread of one process fetches a shard

The folder is meant for one process of a machine. Others may use it at the same time and never see
half a shard, but each keeps to the bound by itself, and may remove what another reads: that one
fetches it again.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import threading
from pathlib import Path

import numpy as np

from stablelm_jax.data.shards import (
    ShardError,
    ShardIndex,
    ShardInfo,
    file_sha256,
    read_tokens,
    shard_error,
)
from stablelm_jax.storage.files import replacing
from stablelm_jax.storage.remote import RemotePath


class ShardCache:
    """A folder of at most `max_bytes` of shards. Thread-safe."""

    def __init__(self, folder: str | os.PathLike, max_bytes: float):
        """Makes nothing yet: a run whose data is local needs no cache."""
        self.folder, self.max_bytes = Path(os.path.expanduser(folder)), max_bytes
        self._held: dict[str, int] = {}  # bytes by sha256
        self._lock = threading.Lock()

    def fetch(self, path: RemotePath, info: ShardInfo) -> Path | None:
        """The local copy of a shard, fetched and checked unless it is here; None: it has no room.

        Raises:
          ShardError: what came has not the size or the sha256 of the manifest.
          OSError: the network or the disk.
        """
        with self._lock:
            if info.sha256 not in self._held:
                if sum(self._held.values()) + info.bytes > self.max_bytes:
                    return None
                (self.folder / "locks").mkdir(parents=True, exist_ok=True)
                self._held[info.sha256] = info.bytes
                self._evict()
        target = self.folder / f"{info.sha256}.bin"
        with open(self.folder / "locks" / info.sha256[:2], "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                os.utime(target)  # was used just now
                is_whole = target.stat().st_size == info.bytes
            except FileNotFoundError:
                is_whole = False
            if not is_whole:
                with replacing(target) as aside:
                    path.fetch(aside)
                    info.compare(path, bytes=aside.stat().st_size, sha256=file_sha256(aside))
        return target

    def _evict(self) -> None:
        """Makes room for what is held."""
        found, room = [], self.max_bytes - sum(self._held.values())
        for path in self.folder.glob("*.bin*"):
            with contextlib.suppress(FileNotFoundError):  # another process may remove it, too
                if path.name.split(".")[0] not in self._held:
                    found.append((path.stat().st_mtime, path.stat().st_size, path))
        for _, size, path in sorted(found, reverse=True):  # the newest stay while they fit
            room -= size
            if room < 0:
                with open(self.folder / "locks" / path.name[:2], "wb") as lock:
                    with contextlib.suppress(BlockingIOError):  # another process fetches it
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        path.unlink(missing_ok=True)


class RemoteShard:
    """A shard behind a URL, for reading; has what `TokenStream` needs of a `Shard`."""

    def __init__(self, path: RemotePath, info: ShardInfo):
        """Reads nothing; ShardError: missing, not of the manifest's size, or not of int32."""
        self.path, self.num_tokens, self._info = path, info.tokens, info
        self._local: Path | None = None
        self._by_range = path.cache is None
        if info.bytes != 4 * info.tokens:
            raise ShardError(
                f"{path}: {info.bytes} bytes for {info.tokens} tokens; behind a URL only shards of"
                " int32 are read, copy this source to a local folder"
            )
        try:
            sizes = path.parent.sizes
        except OSError as error:
            raise shard_error(path, error) from error
        if path.name not in sizes:
            raise shard_error(path, FileNotFoundError())
        if sizes[path.name] is not None:
            info.compare(path, bytes=sizes[path.name])

    @functools.cached_property
    def document_offsets(self) -> np.ndarray:
        """As of a `Shard`; fetches the index, which is small."""
        path = self.path.parent / f"{self.path.name.removesuffix('.bin')}.idx"
        try:
            index = ShardIndex(path, np.frombuffer(path.read_bytes(), np.uint8))
        except OSError as error:
            raise shard_error(path, error) from error
        index.check()
        self._info.compare(path, documents=index.num_documents, bytes=index.num_bytes)
        return index.document_offsets

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as a fresh int32 array. The first read may fetch the whole shard.

        Thread-safe. What is read by range cannot be checked by sha256, only by its length.
        """
        try:
            if self._local is None and not self._by_range:
                self._local = self.path.cache.fetch(self.path, self._info)
                self._by_range = self._local is None
            if local := self._local:
                try:
                    return read_tokens(local, start, stop)
                except ShardError:
                    if local.exists():
                        raise
                # Another run removed it from the cache: once more, as at the first read.
                self._local = None
                return self.read(start, stop)
            data = self.path.read_range(4 * start, 4 * stop)
        except OSError as error:
            raise shard_error(self.path, error) from error
        if len(data) == 4 * (stop - start):
            return np.frombuffer(data, "<i4").astype(np.int32)
        why = "the file was cut short after it was opened, restore it or prepare the source again"
        if len(data) > 4 * (stop - start):
            why = "the store does not read by range; raise data.cache_gb to fetch shards whole"
        raise ShardError(f"{self.path}: {len(data)} bytes came for tokens {start} to {stop}; {why}")
