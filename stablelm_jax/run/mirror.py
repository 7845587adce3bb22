"""A run folder behind a URL: its small files are written here and uploaded.

Object stores cannot append, so `metrics.jsonl` goes up in parts, `metrics/part-<byte at which it
starts>.jsonl`: read in the order of their names they are the file. Only the last of them is written
again as lines come. Every other file goes up whole when it has changed. Checkpoints take no part
in this; Orbax writes them to the store itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import threading
from pathlib import Path

from absl import logging

from stablelm_jax.storage.remote import described, filesystem, retried

UPLOAD_SECONDS = 60.0  # between two uploads; one more precedes every checkpoint
METRICS = "metrics.jsonl"
PART_BYTES = 1 << 20
_PART = re.compile(r"part-(\d{12})\.jsonl")
_FETCHED = "environment.json"  # grows by an entry a start, so the next start needs it
_KEPT_HERE = (".lock", ".partial")  # ends of names
_NOT_OURS = "wandb"  # uploads its files to its own service


def mirror_folder(url: str) -> Path:
    """The folder of this machine that a run folder's URL is written through."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    return cache / "stablelm_jax" / "runs" / f"{url.rsplit('/', 1)[-1]}-{digest}"


class NoUpload:
    """Of a run folder that is a folder: it is where its files belong."""

    def start(self) -> None:
        """Does nothing."""

    def upload(self) -> None:
        """Does nothing."""

    def stop(self) -> None:
        """Does nothing."""

    def finish(self) -> None:
        """Does nothing."""


class Mirror:
    """Keeps the URL of a run folder like the local folder, from `start` to `stop` or `finish`.

    What fails to upload is logged as an error and goes up with the next upload; only `finish`
    raises. Thread-safe.
    """

    def __init__(self, url: str, folder: Path, every: float = UPLOAD_SECONDS):
        """`every`: seconds between two uploads.

        Raises:
          ValueError: no driver for the URL.
        """
        self.url, self.folder = url.rstrip("/"), folder
        self._fs, self._root = filesystem(self.url)
        self._every = every
        self._uploaded: dict[str, tuple[int, int]] = {}
        self._parts: dict[int, str] = {}  # start -> sha256 of the parts in the store
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upload", daemon=True)

    def start(self) -> None:
        """Fetches what the next start of the run goes on with, and begins to upload.

        Raises:
          OSError: the store cannot be read.
        """
        if not self._listed("checkpoints"):
            self._clear()  # a new run: what lies here is of another
        stored = self._stored_metrics()
        path = self.folder / METRICS
        # The store knows best, as another host may have gone on with the run; unless all it lacks
        # is the last lines, which then never arrived.
        if not path.exists() or not path.read_bytes().startswith(stored):
            _write(path, stored)
        with contextlib.suppress(FileNotFoundError):
            _write(self.folder / _FETCHED, self._read(_FETCHED))
        self._thread.start()

    def _clear(self) -> None:
        for path in self.folder.rglob("*"):
            if not path.is_dir() and not path.name.endswith(_KEPT_HERE):
                path.unlink()

    def upload(self) -> None:
        """Uploads what has changed. What fails is logged, and stays to be uploaded."""
        for name, error in self._upload().items():
            logging.error(
                "%s/%s was not uploaded (%s); the next try is within %.0f s, and the file is safe"
                " in %s",
                *(self.url, name, error, self._every, self.folder),
            )

    def stop(self) -> None:
        """The last upload of a run that ends by an error."""
        self._ended.set()
        self._thread.join()
        self.upload()

    def finish(self) -> None:
        """The last upload of a run that ends well.

        Raises:
          OSError: after several tries not all has arrived.
        """
        self._ended.set()
        self._thread.join()
        what = f"{self.folder} holds files that are not in {self.url}: run the same command again"
        retried(f"{what}, the upload", self._upload_all)

    def _run(self) -> None:
        while not self._ended.wait(self._every):
            self.upload()

    def _upload_all(self) -> None:
        failed = self._upload()
        if failed:
            raise OSError("; ".join(f"{name}: {error}" for name, error in failed.items()))

    def _upload(self) -> dict[str, str]:
        """One try for each changed file; {name: error} of those that failed."""
        failed = {}
        with self._lock:
            for name, path in self._changed().items():
                bring = self._upload_metrics if name == METRICS else self._upload_file
                try:
                    bring(name, path)
                except Exception as error:  # whatever the driver raises: it must not end a run
                    failed[name] = described(error)
        return failed

    def _changed(self) -> dict[str, Path]:
        """{name: path} of the files here that are not in the store as they are."""
        changed = {}
        for path in sorted(self.folder.rglob("*")):
            relative = path.relative_to(self.folder)
            version = None if path.name.endswith(_KEPT_HERE) else _version(path)
            if version is None or relative.parts[0] == _NOT_OURS:
                continue
            if self._uploaded.get(relative.as_posix()) != version:
                changed[relative.as_posix()] = path
        return changed

    def _upload_file(self, name: str, path: Path) -> None:
        version = _version(path)  # first: what changes meanwhile goes up again
        self._fs.put_file(str(path), f"{self._root}/{name}")
        self._uploaded[name] = version

    def _upload_metrics(self, name: str, path: Path) -> None:
        """Makes the parts in the store those of the file, which may have been cut back."""
        version = _version(path)
        wanted = _split(path.read_bytes())
        for start in sorted(self._parts.keys() - wanted.keys(), reverse=True):
            with contextlib.suppress(FileNotFoundError):  # gone, though the answer never came
                self._fs.rm_file(self._part(start))
            del self._parts[start]
        for start, part in wanted.items():
            digest = hashlib.sha256(part).hexdigest()
            if self._parts.get(start) != digest:
                self._fs.pipe_file(self._part(start), part)
                self._parts[start] = digest
        self._uploaded[name] = version

    def _part(self, start: int) -> str:
        return f"{self._root}/metrics/part-{start:012d}.jsonl"

    def _stored_metrics(self) -> bytes:
        """The lines in the store; notes its parts."""
        data, self._parts = b"", {}
        for start in self._starts():
            part = self._read(f"metrics/part-{start:012d}.jsonl")
            if start != len(data):
                raise OSError(
                    f"{self.url}/metrics: part {start:012d} does not begin where the one before"
                    f" ends ({len(data)}); give the missing part back, or move this one away"
                )
            data += part
            self._parts[start] = hashlib.sha256(part).hexdigest()
        return data

    def _starts(self) -> list[int]:
        matches = (_PART.fullmatch(name.rsplit("/", 1)[-1]) for name in self._listed("metrics"))
        return sorted(int(match[1]) for match in matches if match)

    def _listed(self, name: str) -> list[str]:
        """What lies in a folder of the store. Not `exists`: to some drivers any error means no."""
        path = f"{self._root}/{name}"

        def listed() -> list[str]:
            self._fs.invalidate_cache(path)
            return self._fs.ls(path, detail=False)

        try:
            return retried(f"listing {self.url}/{name}", listed)
        except FileNotFoundError:
            return []

    def _read(self, name: str) -> bytes:
        path = f"{self._root}/{name}"
        return retried(f"reading {self.url}/{name}", lambda: self._fs.cat_file(path))


def _split(data: bytes) -> dict[int, bytes]:
    """{start: whole lines of up to `PART_BYTES`}; a line cut short at the end is left out.

    The parts of a longer file are the same but for the last one.
    """
    parts, start, end = {}, 0, data.rfind(b"\n") + 1
    while start < end:
        stop = data.rfind(b"\n", start, start + PART_BYTES) + 1 or data.find(b"\n", start) + 1
        parts[start] = data[start:stop]
        start = stop
    return parts


def _version(path: Path) -> tuple[int, int] | None:
    """Tells one content of a file from the next; None for what is no file, or no longer."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return (found.st_mtime_ns, found.st_size) if stat.S_ISREG(found.st_mode) else None


def _write(path: Path, data: bytes) -> None:
    aside = path.with_name(path.name + ".partial")
    aside.write_bytes(data)
    os.replace(aside, path)
