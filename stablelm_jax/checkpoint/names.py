"""`global_step<N>`: the name of a step branch, for people and for Orbax."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import orbax.checkpoint as ocp
from etils import epath

from stablelm_jax.data import remote

_NAME = re.compile(r"global_step(0|[1-9][0-9]*)")


def branch_name(step: int) -> str:
    """`global_step<step>`."""
    return f"global_step{step}"


def branch_step(name: str) -> int | None:
    """The step of a branch name, or None if it is not one."""
    match = _NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def checkpoint_path(path: epath.PathLike) -> epath.Path:
    """A path of this machine made absolute, or a `gs://` URL, as Orbax can write it.

    Raises:
      ValueError: a URL of another store, or its driver is missing.
    """
    text = str(path).rstrip("/")
    if not remote.is_url(text):
        return epath.Path(path).resolve()
    if not re.match("gs://[^/]+/.", text):
        raise ValueError(
            f"{text}: checkpoints lie in a folder of this machine or at gs://BUCKET/FOLDER; Orbax"
            " writes to no other store, so mount one as a folder (as mountpoint-s3 does)"
        )
    remote.filesystem(text)
    return epath.Path(text)  # resolve() would put the working folder before a URL


@dataclasses.dataclass(frozen=True)
class GlobalStepFormat(ocp.path.step.NameFormat[ocp.path.step.Metadata]):
    """Tells Orbax to write and find `global_step<N>`; unfinished folders do not count."""

    def build_name(self, step: int) -> str:
        return branch_name(step)

    def find_all(self, base_path: epath.PathLike) -> Iterator[ocp.path.step.Metadata]:
        for path in epath.Path(base_path).iterdir():
            step = branch_step(path.name)
            if step is not None and ocp.path.step.is_path_finalized(path):
                yield ocp.path.step.Metadata(step=step, path=path)

    def find_step(self, base_path: epath.PathLike, step: int) -> ocp.path.step.Metadata:
        for found in self.find_all(base_path):
            if found.step == step:
                return found
        raise ValueError(f"no finished checkpoint {branch_name(step)} in {base_path}")
