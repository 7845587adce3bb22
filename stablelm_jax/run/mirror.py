"""A run folder behind a URL: its small files are written on this machine and copied to the store.

Object stores cannot append, so a file that has changed goes up whole: at each checkpoint and at the
end. The checkpoints take no part in this; Orbax writes them to the store itself.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from pathlib import Path

from absl import logging

from stablelm_jax.storage.files import PARTIAL, replacing
from stablelm_jax.storage.remote import described, filesystem, retried

LOCK = ".lock"  # the run holds it while the folder is cleared


class RemoteMirror:
    """Copies `folder`, a folder of this machine, to the URL of a run folder."""

    def __init__(self, url: str):
        """Raises ValueError where there is no driver for the URL."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        name, digest = url.rsplit("/", 1)[-1], hashlib.sha256(url.encode()).hexdigest()[:12]
        self.folder = cache / "stablelm_jax" / "runs" / f"{name}-{digest}"
        self._url, (self._fs, self._root) = url, filesystem(url)
        self._uploaded: dict[Path, tuple[int, int]] = {}  # time and size of a file that went up

    def fetch(self) -> None:
        """Fetches the files that a new start of the run adds to; OSError where it cannot."""
        stored = self._listed(self._root)
        if "checkpoints" not in stored:  # a new run: the files here belong to an older one
            for path in self.folder.rglob("*"):
                if path.is_file() and path.name != LOCK:
                    path.unlink()
        files = {name: [name] for name in ("metrics.jsonl", "environment.json") if name in stored}
        if "reference" in stored:
            (self.folder / "reference").mkdir(exist_ok=True)
            names = [f"reference/{name}" for name in self._listed(f"{self._root}/reference")]
            files |= {name: [name] for name in names}
        if "metrics" in stored:  # older versions wrote the lines in parts: metrics/part-*.jsonl
            parts = [f"metrics/{name}" for name in self._listed(f"{self._root}/metrics")]
            files.setdefault("metrics.jsonl", parts)
        for name, parts in files.items():
            path, content = self.folder / name, b""
            for part in parts:
                start = part.removesuffix(".jsonl").rpartition("-")[2]
                if part != name and start != f"{len(content):012d}":
                    raise OSError(
                        f"{self._url}/{part} does not begin where the part before it ends "
                        f"({len(content)}); give the missing part back, or move this one away"
                    )
                action = functools.partial(self._fs.cat_file, f"{self._root}/{part}")
                content += retried(f"reading {self._url}/{part}", action)
            # Another host may have gone on with the run, so the store is right; unless it only
            # lacks the last lines, whose upload failed.
            if not (path.exists() and path.read_bytes().startswith(content)):
                with replacing(path) as aside:
                    aside.write_bytes(content)

    def upload(self) -> None:
        """Copies the changed files. One that fails is logged, and goes up with the next upload."""
        try:
            self._upload_changed()
        except OSError as error:
            logging.error("%s; tried again later; the files are safe in %s", error, self.folder)

    def finish(self) -> None:
        """The last upload of a run that ends well; OSError if a file fails several times."""
        what = f"{self.folder} holds files that are not in {self._url}: run the same command again"
        retried(f"{what}, the upload", self._upload_changed)

    def upload_file(self, path: Path) -> None:
        """Copies one file of the folder; raises what the driver raises."""
        self._fs.put_file(str(path), f"{self._root}/{path.relative_to(self.folder).as_posix()}")

    def _upload_changed(self) -> None:
        failed = []
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if name.startswith("wandb/") or name.endswith((LOCK, PARTIAL)) or not path.is_file():
                continue  # Weights & Biases uploads its own
            try:
                status = path.stat()  # first: a file that changes during the copy goes up again
                if name.startswith("hang/") and status.st_size == 0:
                    continue  # ready for stacks, which there are not
                if self._uploaded.get(path) != (status.st_mtime_ns, status.st_size):
                    self.upload_file(path)
                    self._uploaded[path] = (status.st_mtime_ns, status.st_size)
            except Exception as error:  # each driver raises its own, and none may end a run
                failed.append(f"{self._url}/{name} was not uploaded ({described(error)})")
        if failed:
            raise OSError("; ".join(failed))

    def _listed(self, path: str) -> list[str]:
        """The names in a folder. Not `exists`: some drivers take any error for a no."""
        with contextlib.suppress(FileNotFoundError):
            action = functools.partial(self._fs.ls, path, detail=False, refresh=True)
            found = retried(f"listing {self._url}", action)
            return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in found)
        return []
