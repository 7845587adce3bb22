"""Whether a shard was changed under a run: asked when it starts and before each of its saves.

The fingerprint of a file is its size and modification time, which costs one `stat`. A file whose
fingerprint moved is read whole and compared with its manifest: a copy or a `touch` leaves the bytes
alone and passes, anything else is refused before it is trained on. Bytes that change under the same
size and time, as on a failing disk, are not seen here. Nor are shards behind a URL: those are
compared with their sha256 when they are fetched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from stablelm_jax.data.manifest import Source, open_shard
from stablelm_jax.data.shards import ShardError, file_sha256
from stablelm_jax.parallel import distributed
from stablelm_jax.storage.files import write_json
from stablelm_jax.storage.remote import RemotePath


class FileFingerprints:
    """The shards of a run as they were seen last: {"<source>/<file>": [bytes, mtime in ns]}.

    Process 0 keeps them in `path`, the run folder's `shards.json`, for the next start. Other hosts
    may have copies of the data of their own, which they compare while they run. `tell` gets a line
    for each shard that is read whole.
    """

    def __init__(self, path: Path, sources: Mapping[str, Source], tell: Callable[[str], None]):
        self._path, self._tell, self._seen = path, tell, {}
        self._shards = [
            (name, source.directory / info.file, info)
            for name, source in sources.items()
            if not isinstance(source.directory, RemotePath)
            for info in source.manifest.shards
        ]
        if distributed.is_first() and path.exists():
            try:
                self._seen = dict(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError, OSError):
                tell(f"{path} is broken: the shards are taken as they are now")

    def check(self) -> None:
        """Compares both files of every shard, train and held-out, with what was seen last.

        A file that was never seen passes, as one of a source that joins in a later stage. A
        ShardError is raised on every process and names the files that are missing or changed.
        """
        seen, wrong = dict(self._seen), []
        for name, path, info in self._shards:
            try:
                # Before the shard is read: what changes from here on shows the next time.
                found = {file: file.stat() for file in (path, path.with_suffix(".idx"))}
                now = {f"{name}/{f.name}": [s.st_size, s.st_mtime_ns] for f, s in found.items()}
                if any(seen.get(key, value) != value for key, value in now.items()):
                    self._tell(
                        f"{path}: size or time changed since this run recorded it;"
                        f" reading {info.bytes / 1e6:,.1f} MB to see whether its bytes did"
                    )
                    open_shard(path, info).check()
                    info.compare(path, sha256=file_sha256(path))
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
