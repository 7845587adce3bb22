"""The run folder: a run explains itself.

WORKDIR/           a folder, or a URL whose small files are written to a local folder and uploaded
  config.json        the resolved config and where each value was set
  tokenizer.json     where the tokenizer is a file: beside the checkpoints, which need it
  environment.json   versions, devices, git commit, command: one entry for each start
  metrics.jsonl      one line every `training.log_every` steps, one for each evaluation
  events.jsonl       what else happened: signals, saves that failed, updates left out, changes
  hang/              with a hang: the stacks of every process
  shards.json        sizes and times of the shards, to notice one that changes
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
from stablelm_jax.run.mirror import LOCK, RemoteMirror
from stablelm_jax.storage.files import write_json, write_text
from stablelm_jax.storage.remote import is_url
from stablelm_jax.tokenizer.tokenizer import HuggingFaceTokenizer, Tokenizer

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tiktoken")


class RunFolder:
    """Paths and small files of one run. Only process 0 writes.

    Attributes:
      where: the path or URL of the run folder.
      path: the folder of this machine that all but the checkpoints are written to.
      checkpoints: the folder of these, which may be a URL.
    """

    def __init__(self, workdir: str | os.PathLike[str]):
        """Raises ValueError where no checkpoint can be written to `workdir`."""
        self.where = str(checkpoint_path(workdir))
        self.checkpoints = checkpoint_path(workdir) / "checkpoints"
        self._mirror = RemoteMirror(self.where) if is_url(workdir) else None
        self.path = self._mirror.folder if self._mirror else Path(self.where)
        self.samples = self.path / "samples"
        self.loss_picture = self.path / "loss.png"
        self.metrics = MetricsFile(self.path / "metrics.jsonl")
        self.events = self.path / "events.jsonl"

    def __str__(self) -> str:
        return f"{self.where}, small files by way of {self.path}" if self._mirror else self.where

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Makes the folder and holds it: two trainings in it would mix their lines.

        The lock is the operating system's, so it ends with the process, however that ends. Object
        stores have none: behind a URL only the processes of one machine are kept apart.

        Raises:
          ValueError: another process trains in this folder.
          OSError: on leaving, if not all could be uploaded.
        """
        new = not self.path.exists()
        self.samples.mkdir(parents=True, exist_ok=True)
        with open(self.path / LOCK, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another process trains in {self.where}; wait for it, or use another --workdir"
                ) from None
            try:
                if self._mirror:
                    self._mirror.fetch()
                yield
            except BaseException:
                self.upload()
                if new and all(p.is_dir() or p.name == LOCK for p in self.path.rglob("*")):
                    shutil.rmtree(self.path)  # the start failed before anything was written
                raise
            if self._mirror:
                self._mirror.finish()

    def upload(self) -> None:
        """Brings what has changed to the run folder's URL, if it has one."""
        if self._mirror:
            self._mirror.upload()

    def upload_file(self, path: Path) -> None:
        """Uploads one file below `path`, from any process; tries once and never raises."""
        with contextlib.suppress(Exception):  # the network may be what hangs
            if self._mirror:
                self._mirror.upload_file(path)

    def describe(
        self, config: dict[str, Any], set_by: dict[str, str], tokenizer: Tokenizer
    ) -> None:
        """Writes `config.json` and `tokenizer.json`, and adds this start to `environment.json`.

        Args:
          config: the resolved tree.
          set_by: {key: default | file | command line}.
          tokenizer: written where it is a file; Arcade100k comes with this package.
        """
        write_json(self.path / "config.json", {"config": config, "set_by": set_by})
        if isinstance(tokenizer, HuggingFaceTokenizer):
            write_text(self.path / "tokenizer.json", tokenizer.content.decode())
        path = self.path / "environment.json"
        starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        write_json(path, [*starts, environment()])

    def write_sample(self, name: str, text: str) -> None:
        """Writes `samples/<name>.txt`."""
        write_text(self.samples / f"{name}.txt", text)


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
    here = str(Path(__file__).resolve().parent)
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.strip() or None
