"""The run folder: a run explains itself.

WORKDIR/           a folder, or a URL whose small files are written to a local folder and uploaded
  config.json        the resolved config and where each value was set
  tokenizer.json     where the tokenizer is a file: beside the checkpoints, which need it
  environment.json   versions, devices, git commit, command: one entry for each start
  metrics.jsonl      one line every `training.log_every` steps, one for each evaluation
  events.jsonl       what else happened: signals, saves that failed, updates left out, changes
  hang/              with a hang: the stacks of every process
  loss.png           the curves of metrics.jsonl
  checkpoints/global_step<N>/
  samples/global_step<N>.txt
  profile/           with `profile.steps`: jax's trace, top_operations.txt
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from stablelm_jax.checkpoint.names import checkpoint_path
from stablelm_jax.run.metrics import MetricsFile
from stablelm_jax.run.mirror import Mirror, NoUpload, mirror_folder
from stablelm_jax.storage.files import write_json, write_text
from stablelm_jax.storage.remote import filesystem, is_url
from stablelm_jax.tokenizer.tokenizer import HuggingFaceTokenizer, Tokenizer

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tiktoken")


class RunFolder:
    """Paths and small files of one run. Only process 0 writes.

    Attributes:
      path: the folder of this machine that all but the checkpoints are written to.
      checkpoints: where those go, which may be a URL.
      uploads: brings `path` to where the run folder is, if that is elsewhere.
    """

    def __init__(self, workdir: str | os.PathLike[str]):
        """Raises ValueError where no checkpoint can be written to `workdir`."""
        self.where = str(checkpoint_path(workdir))
        self.checkpoints = checkpoint_path(workdir) / "checkpoints"
        self.path, self.uploads = Path(self.where), NoUpload()
        if is_url(workdir):
            self.path = mirror_folder(self.where)
            self.uploads = Mirror(self.where, self.path)
        self.samples = self.path / "samples"
        self.loss_picture = self.path / "loss.png"
        self.metrics = MetricsFile(self.path / "metrics.jsonl")
        self.events = self.path / "events.jsonl"

    def __str__(self) -> str:
        through = "" if self.where == str(self.path) else f", small files by way of {self.path}"
        return f"{self.where}{through}"

    def create(self) -> None:
        """Makes the folders."""
        self._is_new = not self.path.exists()
        self.samples.mkdir(parents=True, exist_ok=True)

    def remove_if_unused(self) -> None:
        """A start that failed before it wrote anything leaves no folder behind."""
        if self._is_new and all(p.is_dir() or p.name == ".lock" for p in self.path.rglob("*")):
            shutil.rmtree(self.path)

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Holds the folder: two trainings in one would mix their lines and checkpoints.

        The lock is the operating system's, so it ends with the process, however that ends. Object
        stores have none: behind a URL only the processes of one machine are kept apart.

        Raises:
          ValueError: another process trains in this folder.
          OSError: on leaving, if not all could be uploaded.
        """
        with open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another process trains in {self.where}; wait for it, or use another --workdir"
                ) from None
            with self._uploaded():
                yield

    @contextlib.contextmanager
    def _uploaded(self) -> Iterator[None]:
        self.uploads.start()
        try:
            yield
        except BaseException:
            self.uploads.stop()
            raise
        self.uploads.finish()

    def write_config(self, values: dict[str, Any], set_by: dict[str, str]) -> None:
        """`config.json`: {"config": tree, "set_by": {key: default | file | command line}}."""
        write_json(self.path / "config.json", {"config": values, "set_by": set_by})

    def write_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Whoever moves the run has the tokenizer too; Arcade100k comes with this package."""
        if isinstance(tokenizer, HuggingFaceTokenizer):
            write_text(self.path / "tokenizer.json", tokenizer.content.decode())

    def add_environment(self) -> None:
        """Appends this start to `environment.json`."""
        path = self.path / "environment.json"
        starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        write_json(path, [*starts, environment()])

    def bring(self, path: Path) -> None:
        """Uploads one file of `path` at once, from any process; tries once and never raises."""
        if self.where != str(self.path):
            with contextlib.suppress(Exception):  # the network may be what hangs
                fs, root = filesystem(self.where)
                fs.put_file(str(path), f"{root}/{path.relative_to(self.path).as_posix()}")

    def write_sample(self, name: str, text: str) -> Path:
        """`samples/<name>.txt`; returns its path."""
        path = self.samples / f"{name}.txt"
        write_text(path, text)
        return path


def environment() -> dict[str, Any]:
    """What this process runs on and with."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "devices": [str(d.device_kind) for d in jax.local_devices()],
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "host": platform.node(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "git_commit": git_commit(),
    }


@functools.cache
def git_commit() -> str | None:
    """The commit of the source tree this package lies in, `-dirty` if changed; None outside git."""
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
