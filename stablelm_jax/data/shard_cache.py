"""Shards behind a URL: fetched whole into a bounded folder of this machine, or read by range.

Rows are shuffled over a whole source, so every step needs a little of every shard. A cache that
let go of shards in use would fetch most of the data again every few rows; here a shard that was
given room keeps it until the process ends, and the shards that find no room are read by range. What
gives way, the least recently used first, is what no living process uses.

FOLDER/
  <sha256>.bin       a shard, checked
  <sha256>.partial   a shard on its way
  leases/            one file a process, locked while it lives: which shards it holds
  locks/             so that only one thread of one process fetches a shard
  .lock              held for the moments in which room is given out
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stablelm_jax.data.shards import ShardError, ShardInfo, TokenFile, file_sha256
from stablelm_jax.storage.remote import RemotePath


class ShardCache:
    """A folder of at most `max_bytes` of shards, shared by all processes that name it.

    Every process holds to its own bound. Thread-safe.
    """

    def __init__(self, folder: str | os.PathLike, max_bytes: float):
        """Makes nothing yet: a run whose data is local needs no cache."""
        self.folder = Path(folder).expanduser()
        self.max_bytes = max_bytes
        self._lease = None
        self._held: set[str] = set()
        self._lock = threading.Lock()

    def claim(self, info: ShardInfo) -> bool:
        """Gives a shard room until this process ends; False where the bound leaves none.

        Raises:
          OSError: the folder cannot be written.
        """
        if info.bytes > self.max_bytes:
            return False
        with self._lock:
            return info.sha256 in self._held or self._claim(info)

    def _claim(self, info: ShardInfo) -> bool:
        with self._room_lock():
            leased = self._leased()
            if sum((leased | {info.sha256: info.bytes}).values()) > self.max_bytes:
                return False
            self._evict(info, leased)
            self._hold(info)
        return True

    def fetch(self, path: RemotePath, info: ShardInfo) -> Path:
        """The local copy of a claimed shard, fetched and checked unless it is here already.

        Raises:
          ShardError: what came has not the size or the sha256 of the manifest.
          OSError: the network or the disk.
        """
        target = self.folder / f"{info.sha256}.bin"
        with _locked(self.folder / "locks" / info.sha256[:2]):
            if not target.exists() or target.stat().st_size != info.bytes:
                partial = target.with_suffix(".partial")
                path.fetch(partial)
                _check(partial, path, info)
                os.replace(partial, target)
            os.utime(target)
        return target

    @contextlib.contextmanager
    def _room_lock(self) -> Iterator[None]:
        for name in ("leases", "locks"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / ".lock"):
            yield

    def _hold(self, info: ShardInfo) -> None:
        if self._lease is None:
            leases = self.folder / "leases"
            self._lease = tempfile.NamedTemporaryFile("w", dir=leases)  # noqa: SIM115
            fcntl.flock(self._lease, fcntl.LOCK_EX)
        self._lease.write(f"{info.sha256} {info.bytes}\n")
        self._lease.flush()
        self._held.add(info.sha256)

    def _leased(self) -> dict[str, int]:
        """{sha256: bytes} of what living processes hold; forgets the dead."""
        leased = {}
        for path in (self.folder / "leases").iterdir():
            with contextlib.suppress(FileNotFoundError), open(path) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    leased |= {sha: int(size) for sha, size in map(str.split, file)}
                else:
                    path.unlink()
        return leased

    def _evict(self, info: ShardInfo, leased: dict[str, int]) -> None:
        """Makes room for `info` beside what is leased."""
        found = [path for path in self.folder.iterdir() if path.suffix in (".bin", ".partial")]
        free = [(path.stat(), path) for path in found if path.stem not in leased | {info.sha256: 0}]
        total = sum((leased | {info.sha256: info.bytes}).values())
        total += sum(stat.st_size for stat, _ in free)
        for stat, path in sorted(free, key=lambda entry: entry[0].st_mtime_ns):
            if total <= self.max_bytes:
                return
            path.unlink()
            total -= stat.st_size


class RemoteShard:
    """A shard behind a URL, for reading; has what `TokenStream` needs of a `Shard`.

    Attributes:
      path: of the `.bin`.
      num_tokens: count.
    """

    def __init__(self, path: RemotePath, info: ShardInfo):
        """Compares the size that the store tells with the manifest's; reads nothing.

        Raises:
          ShardError: missing, of another size, or of tokens that are not int32.
        """
        self.path, self.num_tokens = path, info.tokens
        self._info = info
        self._file: TokenFile | None = None
        self._by_range = path.cache is None
        if info.bytes != 4 * info.tokens:
            raise ShardError(
                f"{path}: {info.bytes} bytes for {info.tokens} tokens; behind a URL only shards of"
                " int32 are read, copy this source to a local folder"
            )
        _check_size(path, info)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as a fresh int32 array. Thread-safe.

        The first read may fetch the whole shard. What is read by range cannot be checked by
        sha256, only by its length.
        """
        if self._file is not None:
            return self._file.read(start, stop)
        try:
            if not self._by_range and self.path.cache.claim(self._info):
                local = self.path.cache.fetch(self.path, self._info)
                self._file = TokenFile(local, np.dtype("<i4"))
                return self._file.read(start, stop)
            self._by_range = True
            data = self.path.read_range(4 * start, 4 * stop)
        except OSError as error:
            raise _shard_error(self.path, error) from error
        self._check_range(data, start, stop)
        return np.frombuffer(data, "<i4").astype(np.int32)

    def _check_range(self, data: bytes, start: int, stop: int) -> None:
        if len(data) == 4 * (stop - start):
            return
        why = "the file was cut short after it was opened, restore it or prepare the source again"
        if len(data) > 4 * (stop - start):
            why = "the store does not read by range; raise data.cache_gb to fetch shards whole"
        raise ShardError(f"{self.path}: {len(data)} bytes came for tokens {start} to {stop}; {why}")


def _check_size(path: RemotePath, info: ShardInfo) -> None:
    try:
        sizes = path.parent.sizes
    except OSError as error:
        raise _shard_error(path, error) from error
    if path.name not in sizes:
        raise ShardError(f"{path}: missing; restore it or prepare the source again")
    size = sizes[path.name]
    if size is not None and size != info.bytes:
        raise ShardError(
            f"{path}: {size} bytes where the manifest says {info.bytes};"
            " restore the file or prepare the source again"
        )


def _check(partial: Path, path: RemotePath, info: ShardInfo) -> None:
    found = (partial.stat().st_size, file_sha256(partial))
    for what, one, other in zip(("bytes", "sha256"), found, (info.bytes, info.sha256)):
        if one != other:
            partial.unlink()
            raise ShardError(
                f"{path}: {what} {one} where the manifest says {other}; restore the file in the"
                " store or prepare the source again"
            )


def _shard_error(path: RemotePath, error: OSError) -> ShardError:
    if isinstance(error, FileNotFoundError):
        return ShardError(f"{path}: missing; restore it or prepare the source again")
    return ShardError(f"{path}: cannot be read ({error})")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for the lock of a file, which ends with the process, however that ends."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
