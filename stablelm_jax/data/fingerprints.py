"""Stamps: whether a shard was changed under a run.

A run records size and modification time of its shards, which costs one `stat` a file, and looks
again whenever it starts. A shard whose stamp moved is read whole and held against its manifest: a
copy or a `touch` leaves the bytes alone and passes, anything else is refused before it is trained
on. What changes bytes and leaves both size and time, as a failing disk may, is not seen here. Nor
is another manifest: the data's hash is that of another run then.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

from stablelm_jax.data.manifest import ManifestError, Source, open_shard
from stablelm_jax.data.shards import ShardError, ShardInfo, bin_path, file_sha256, idx_path
from stablelm_jax.storage.remote import RemotePath

Stamps = dict[str, list[int]]


def take(sources: Mapping[str, Source]) -> Stamps:
    """{"<source>/<file>": [bytes, mtime in ns]} of every local shard, train and held-out.

    Both files of a shard are in it. Sources behind a URL are not: a shard of theirs is compared
    with its sha256 when it is fetched. Goes into JSON and comes back as it was.

    Raises:
      ShardError: a file is missing or out of reach; the message names it.
    """
    return {key: _stamp(path) for key, path, _ in _files(sources)}


def check(
    sources: Mapping[str, Source],
    recorded: Mapping[str, list[int]],
    progress: Callable[[str], None],
) -> Stamps:
    """Holds the shards against the stamps `recorded` by this run; returns the stamps of now.

    What has no stamp in `recorded`, such as a source of a later stage of the mixture, passes.

    Args:
      sources: of the run, with their manifests as read.
      recorded: what `take` or `check` returned before.
      progress: gets a line for each file that has to be read whole.

    Raises:
      ShardError: files that are missing, or have not the bytes they had; all are named.
    """
    stamps = take(sources)  # before anything is read: what changes from here on shows next time
    wrong = []
    for key, path, info in _files(sources):
        if recorded.get(key, stamps[key]) != stamps[key]:
            progress(
                f"{path}: size or time changed since this run recorded it;"
                f" reading {stamps[key][0] / 1e6:,.1f} MB to see whether its bytes did"
            )
            wrong += _differences(path, info)
    if wrong:
        raise ShardError(
            f"shards were changed since this run began: {'; '.join(wrong)}. Restore them as they"
            " were, or prepare the documents as another source and start another run with it"
        )
    return stamps


def _files(sources: Mapping[str, Source]) -> Iterator[tuple[str, pathlib.Path, ShardInfo]]:
    """Key, path and shard of each local file; `.bin` and `.idx` share a shard."""
    for name, source in sources.items():
        if isinstance(source.directory, RemotePath):
            continue
        for info in source.manifest.train.shards + source.manifest.held_out.shards:
            path = source.directory / info.file
            for file in (bin_path(path), idx_path(path)):
                yield f"{name}/{file.name}", file, info


def _stamp(path: pathlib.Path) -> list[int]:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise ShardError(f"{path}: missing; restore it or prepare the source again") from None
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror})") from error
    return [status.st_size, status.st_mtime_ns]


def _differences(path: pathlib.Path, info: ShardInfo) -> list[str]:
    """What of a file's contents is not as the manifest has it, naming the file; often nothing."""
    try:
        if path == idx_path(path):
            # The manifest has no sha256 of it; a run needs of it what is compared here.
            open_shard(bin_path(path), info).check()
        elif path.stat().st_size != info.bytes:
            return [f"{path} has {path.stat().st_size} bytes where the manifest says {info.bytes}"]
        elif file_sha256(path) != info.sha256:
            return [f"{path} has not the sha256 of the manifest"]
    except (ShardError, ManifestError) as error:
        return [str(error)]
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror or error})") from error
    return []
