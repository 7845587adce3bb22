"""A source for an object store: it is made in a folder of this machine and sent from there.

What lies in such a store can be neither appended to nor renamed, so nothing goes there in pieces,
and the manifest goes last: what has none is no source yet.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import track

from stablelm_jax.data.manifest import MANIFEST_NAME, read_manifest
from stablelm_jax.preparation import lists
from stablelm_jax.storage.files import write_json
from stablelm_jax.storage.remote import RemotePath, retried

_SENT = ".sent.json"  # {file: [bytes, time of change]} of those that are in the store
_THREADS = 8


def work_folder(url: str) -> Path:
    """Where sources for the folder `url` of a store are made if no other place is named."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return cache / "stablelm_jax" / "prepare" / hashlib.sha256(url.encode()).hexdigest()[:12]


def send(directory: Path, place: RemotePath, console: Console) -> None:
    """Copies a finished source to the folder `place`, then removes it from `directory`.

    A call that was interrupted goes on with the file it was at. Raises OSError where a file cannot
    be sent, or has another size in the store than here; all is still in `directory` then.
    """
    record = directory / _SENT
    sent = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    stems = {Path(info.file).stem for info in read_manifest(directory).shards}
    files = {
        path.name: path  # what `prepare` made, and nothing that somebody else put beside it
        for path in directory.iterdir()
        if path.name in lists.NAMES or path.name.partition(".")[0] in stems
    }
    manifest = directory / MANIFEST_NAME

    def put(path: Path) -> tuple[str, list[int]]:
        status = path.stat()
        version = [status.st_size, status.st_mtime_ns]
        if sent.get(path.name) != version:
            target = f"{place.path}/{path.name}"
            retried(f"sending {path} to {place}", lambda: place.fs.put_file(str(path), target))
        return path.name, version

    place.fs.makedirs(place.path, exist_ok=True)
    with ThreadPoolExecutor(_THREADS) as pool:
        done = pool.map(put, sorted(files.values()))
        for name, version in track(done, f"to {place}", len(files), console=console):
            sent[name] = version
            write_json(record, sent)
    place.__dict__.pop("sizes", None)  # as it was listed before
    for name, path in files.items():
        if place.sizes.get(name) != path.stat().st_size:
            record.unlink()
            raise OSError(
                f"{place}/{name}: {place.sizes.get(name)} bytes where {path} has"
                f" {path.stat().st_size}; run the same command again, which sends it again"
            )
    put(manifest)
    for path in [manifest, *files.values(), record]:
        path.unlink()
