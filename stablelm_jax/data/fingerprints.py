"""Whether a shard was changed under a run: asked when it starts and before each of its saves.

The fingerprint of a file is its size and modification time, which costs one `stat`. A file whose
fingerprint moved is read whole and compared with its manifest: a copy or a `touch` leaves the bytes
alone and passes, anything else is refused before it is trained on. Bytes that change under the same
size and time, as on a failing disk, are not seen here. Nor are shards behind a URL: those are
compared with their sha256 when they are fetched. Several hosts compare `shard_samples` first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stablelm_jax.data.manifest import Source, check_shard, data_hash, open_shard
from stablelm_jax.data.shards import ShardError, ShardInfo, spans_path
from stablelm_jax.parallel import distributed
from stablelm_jax.storage.files import write_json
from stablelm_jax.storage.remote import RemotePath

_BLOCKS, _BLOCK_TOKENS, _THREADS = 5, 1024, 32  # the first tokens of a shard, the last, between
_WHOLE_TOKENS = 1 << 20  # a shard that is not larger is read whole


def shard_samples(sources: Mapping[str, Source]) -> dict[str, str]:
    """{"<source>": hash of its manifest's contents, "<source>/<file>": hash of some of its tokens}.

    It reads by range where `sources` have no cache. ShardError where a shard cannot be read.
    """
    shards = _shards(sources)
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = list(pool.map(_sample, *zip(*shards.values())))
    contents = {name: data_hash({name: source.manifest}) for name, source in sources.items()}
    return contents | dict(zip(shards, hashes))


def check_whole(sources: Mapping[str, Source], names: Iterable[str]) -> None:
    """Reads these local shards, keys of `shard_samples`; ShardError: not as the manifest says."""
    for name, (path, info) in _shards(sources).items():
        if name in names and not isinstance(path, RemotePath):
            check_shard(path, info)


def _shards(sources: Mapping[str, Source]) -> dict[str, tuple[Path | RemotePath, ShardInfo]]:
    return {
        f"{name}/{info.file}": (source.directory / info.file, info)
        for name, source in sources.items()
        for info in source.manifest.shards
    }


def _sample(path: Path | RemotePath, info: ShardInfo) -> str:
    shard, digest = open_shard(path, info), hashlib.sha256()
    size = info.tokens if info.tokens <= _WHOLE_TOKENS else _BLOCK_TOKENS
    starts = {number * (info.tokens - size) // (_BLOCKS - 1) for number in range(_BLOCKS)}
    for start in sorted(starts) if size else ():
        digest.update(shard.read(start, start + size))
    return digest.hexdigest()[:16]


class FileFingerprints:
    """The shards of a run as they were seen last: {"<source>/<file>": [bytes, mtime in ns]}.

    Process 0 keeps them in `path`, the run folder's `shards.json`, for the next start; other hosts
    compare copies of their own while they run. `tell` gets a line for each shard read whole.
    """

    def __init__(self, path: Path, sources: Mapping[str, Source], tell: Callable[[str], None]):
        self._path, self._tell, self._seen = path, tell, {}
        shards = [(name.split("/")[0], *shard) for name, shard in _shards(sources).items()]
        self._shards = [shard for shard in shards if not isinstance(shard[1], RemotePath)]
        if distributed.is_first() and path.exists():
            try:
                self._seen = dict(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError, OSError):
                tell(f"{path} is broken: the shards are taken as they are now")

    def check(self) -> None:
        """Compares the files of every shard, train and held-out, with what was seen last.

        A file that was never seen passes, as one of a source that joins in a later stage. A
        ShardError is raised on every process and names the files that are missing or changed.
        """
        seen, wrong = dict(self._seen), []
        for name, path, info in self._shards:
            try:
                # Before the shard is read: what changes from here on shows the next time.
                files = [path, path.with_suffix(".idx")]
                files += [spans_path(path)] if info.spans_sha256 else []
                found = {file: file.stat() for file in files}
                now = {f"{name}/{f.name}": [s.st_size, s.st_mtime_ns] for f, s in found.items()}
                if any(seen.get(key, value) != value for key, value in now.items()):
                    self._tell(
                        f"{path}: size or time changed since this run recorded it;"
                        f" reading {info.bytes / 1e6:,.1f} MB to see whether its bytes did"
                    )
                    check_shard(path, info)
                seen |= now
            except ShardError as error:
                wrong.append(str(error))
            except OSError as error:
                wrong.append(f"{error.filename or path}: {error.strerror or error}")
        if distributed.anywhere(bool(wrong)):
            raise ShardError(
                "shards are missing, or were changed since this run began: "
                f"{'; '.join(wrong) or 'on another host, see its output'}. Restore them as they"
                " were, or prepare the documents as another source and start another run with it"
            )
        if seen != self._seen and distributed.is_first():
            try:
                write_json(self._path, seen)
            except OSError as error:
                self._tell(f"{self._path} cannot be written ({error}); the run goes on")
        self._seen = seen
