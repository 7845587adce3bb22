"""The run folder: a run explains itself.

WORKDIR/           a folder, or a URL whose small files are written to a local folder and uploaded
  config.json        the resolved config and where each value was set
  tokenizer.json     where the tokenizer is a file: beside the checkpoints, which need it
  environment.json   versions, devices, git commit, command: one entry for each start
  metrics.jsonl      one line every `training.log_every` steps, one for each evaluation
  events.jsonl       what else happened: signals, saves that failed, updates left out, changes
  hang/              with a hang: the stacks of every process
  orbax-process<i>.log   with a save that fails: all that the checkpoint library says of it
  shards.json        sizes and times of the shards, to notice one that changes
  goodput.json       the newest sign of life: seconds by cause, over all starts
  loss.png           the curves of metrics.jsonl
  report.html        all that is here on one page, for a browser
  reference/         of DPO: what it compares with (training/reference.py)
  checkpoints/global_step<N>/
  samples/global_step<N>.txt
  held_out/global_step<N>.json   losses of each held-out document, which `report` pairs
  restarts.json      a launch script's: what it has started again, and from where
  tensorboard/, wandb/, wandb_id   with `writers`
  profile/           with `profile.steps`: jax's trace, top_operations.txt
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from etils import epath

from stablelm_jax.checkpoint.names import checkpoint_path
from stablelm_jax.parallel import distributed
from stablelm_jax.run.mirror import LOCK, RemoteMirror
from stablelm_jax.storage.files import free_name, what_is, write_json, write_text
from stablelm_jax.storage.remote import is_url, retried
from stablelm_jax.tokenizer.tokenizer import HuggingFaceTokenizer, Tokenizer

# What lies in a run folder beside the checkpoints only informs: no start fails because of it.
_FILES = ("config.json", "tokenizer.json", "environment.json", "metrics.jsonl", "events.jsonl")
_FILES += ("shards.json", "loss.png", "report.html", LOCK)
_FOLDERS = ("samples", "held_out", "reference", "hang", "profile", "tensorboard", "wandb")
_JSON = {"environment.json": list, "shards.json": dict}  # those that a start reads
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tiktoken")
_SEEN_SECONDS = 5.0  # in which a file of another host has to be seen


class RunFolder:
    """The folder of one run. Only process 0 writes."""

    def __init__(self, workdir: str | os.PathLike[str]):
        """Raises ValueError where no checkpoint can be written to `workdir`."""
        self.where = str(checkpoint_path(workdir))  # a path, or a URL
        self.checkpoints = checkpoint_path(workdir) / "checkpoints"
        self.moved_aside: list[str] = []  # a line for each file that could not be used
        self.mirror = RemoteMirror(self.where) if is_url(workdir) else None
        # On this machine; all but the checkpoints are written there, and mirrored to a URL.
        self.path = self.mirror.folder if self.mirror else Path(self.where)

    def __str__(self) -> str:
        return f"{self.where}, small files by way of {self.path}" if self.mirror else self.where

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """The folder, made and held by process 0; no process goes on without it.

        ValueError: another run trains in it. OSError: it cannot be made; on leaving: not all could
        be uploaded.
        """
        with contextlib.ExitStack() as stack:
            with distributed.together_or_not():
                if distributed.is_first():
                    stack.enter_context(self._held())
            if jax.process_count() > 1:
                self._check_shared()
            yield

    def _check_shared(self) -> None:
        """Every host has to see what process 0 writes here, and to write: they save together."""
        name = f".start-{distributed.gathered(secrets.token_hex(8))[0]}"
        first, own = (self.checkpoints.parent / f"{name}-{n}" for n in (0, jax.process_index()))

        def write() -> None:
            retried(f"writing {own}", lambda: own.write_bytes(b""))

        try:
            with distributed.together_or_not():
                if distributed.is_first():
                    write()
            with distributed.together_or_not():
                self._wait_for(first)
                write()
        finally:
            own.unlink(missing_ok=True)

    def _wait_for(self, file: epath.Path) -> None:
        """Network file systems may show a file of another host some seconds later."""
        until = time.monotonic() + _SEEN_SECONDS
        while not file.exists():
            if time.monotonic() > until:
                raise OSError(
                    f"does not see in --workdir {self.where} what process 0 writes there; give a "
                    "folder that all hosts share, or a gs:// URL"
                )
            time.sleep(0.2)

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Makes the folder and locks it: two trainings in it would mix their lines.

        The lock is the operating system's, so it ends with the process, however that ends. Object
        stores have none: behind a URL only the processes of one machine are kept apart.
        """
        new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        self._move_aside(LOCK)
        with open(self.path / LOCK, "wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another process trains in {self.where}; wait for it, or use another --workdir"
                ) from None
            fetched = False
            try:
                self._move_aside(*_FILES, *_FOLDERS)
                if self.mirror:
                    self.mirror.fetch()
                    self._move_aside(*_JSON)
                fetched = True
                (self.path / "samples").mkdir(exist_ok=True)
                _end_last_line(self.path / "events.jsonl")
                yield
            except BaseException:
                if fetched:  # else the files here may be older than those of the store
                    self.upload()
                if new and all(p.is_dir() or p.name == LOCK for p in self.path.rglob("*")):
                    shutil.rmtree(self.path)  # the start failed before anything was written
                raise
            if self.mirror:
                self.mirror.finish()

    def _move_aside(self, *names: str) -> None:
        """Gives another name to what a start cannot use, if it can be renamed."""
        for path in (self.path / name for name in names):
            if problem := _problem(path):
                with contextlib.suppress(OSError):
                    now = path.rename(free_name(path, ".damaged"))
                    self.moved_aside.append(f"{path} {problem}; it is now called {now.name}")

    def upload(self) -> None:
        """Brings what has changed to the run folder's URL, if it has one."""
        if self.mirror:
            self.mirror.upload()

    def describe(
        self, config: dict[str, Any], set_by: dict[str, str], tokenizer: Tokenizer, tell: Any
    ) -> None:
        """Writes `config.json` and `tokenizer.json`, and adds this start to `environment.json`.

        `set_by`: {key: default | file | command line}. `tell` is `Events.tell`: no file
        that cannot be written ends the run.
        """
        path = self.path / "environment.json"
        try:
            write_json(self.path / "config.json", {"config": config, "set_by": set_by})
            if isinstance(tokenizer, HuggingFaceTokenizer):  # Arcade100k comes with this package
                write_text(self.path / "tokenizer.json", tokenizer.content.decode())
            starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
            write_json(path, [*starts, _environment()])
        except (OSError, ValueError) as error:
            tell("disk", f"{self.path} does not take what describes the run ({error}); it goes on")


def _problem(path: Path) -> str:
    """Why a file or folder of a run cannot be used as what its name says; '' where it can."""
    what, meant = what_is(path), "a folder" if path.name in _FOLDERS else "a file"
    if what != meant:
        return what and f"is {what}"
    # The lock, maybe of another user, is only opened.
    if path.name != LOCK and not os.access(path, os.R_OK | os.W_OK):
        return "may not be read or written"
    if kind := _JSON.get(path.name):
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(json.loads(path.read_text(encoding="utf-8")), kind):
                return ""
        return "does not hold what a run writes there"
    return ""


def _end_last_line(path: Path) -> None:
    """Lines are appended to a file that a loss of power may have cut within one."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def _environment() -> dict[str, Any]:
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
    """The commit of the source tree that is this package's own, `-dirty` if changed; else None.

    An installed package may lie in the repository of somebody else, whose commit says nothing.
    """
    root = Path(__file__).resolve().parents[2]
    command = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    others = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    options = dict(cwd=root, env=others, capture_output=True, encoding="utf-8", timeout=10)
    try:
        project = (root / "pyproject.toml").read_text(encoding="utf-8")
        own = (root / ".git").exists() and 'name = "stablelm_jax"' in project
        return own and subprocess.run(command, **options).stdout.strip() or None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
