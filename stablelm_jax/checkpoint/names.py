"""`global_step<N>`: the name of a step branch."""

from __future__ import annotations

import glob
import os
import re

import orbax.checkpoint as ocp
from etils import epath

from stablelm_jax.storage import remote

REMEDY = "give the path of a folder such as global_step1000, as found under WORKDIR/checkpoints/"
_EPATH_GLOB = type(epath.Path("/")).glob
_NAME = re.compile(r"global_step(0|[1-9][0-9]*)")


def checkpoint_name(step: int) -> str:
    """`global_step<step>`."""
    return f"global_step{step}"


def checkpoint_step(name: str) -> int | None:
    """The step in the name of a checkpoint; None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def checkpoint_path(path: epath.PathLike) -> epath.Path:
    """A path of this machine made absolute, or a `gs://` URL: what Orbax can write.

    ValueError: a URL of another store, or its driver is missing.
    """
    text = str(path).rstrip("/")
    if not remote.is_url(text):
        local = epath.Path(path).resolve()  # not as pathlib does: links stay
        if glob.has_magic(text):
            type(local).glob = _glob  # Orbax makes its paths of this type
        return local
    if not re.match("gs://[^/]+/.", text):
        raise ValueError(
            f"{text}: checkpoints lie in a folder of this machine or at gs://BUCKET/FOLDER; Orbax"
            " writes to no other store, so mount one as a folder (as mountpoint-s3 does)"
        )
    remote.filesystem(text)
    return epath.Path(text)  # resolve() would put the working folder before a URL


def _glob(folder: epath.Path, pattern: str):
    """epath's own takes brackets in a folder's name for a pattern: Orbax would merge nothing."""
    return _EPATH_GLOB(epath.Path(glob.escape(os.fspath(folder))), pattern)


def finished_steps(folder: epath.PathLike) -> list[int]:
    """Steps of the finished checkpoints in a folder `checkpoints/`, ascending; [] without it."""
    found = {checkpoint_step(path.name): path for path in entries(folder)}
    found.pop(None, None)  # other names
    return sorted(step for step, path in found.items() if is_finished(path))


def is_finished(path: epath.Path) -> bool:
    """Whether what has the name of a checkpoint was once whole: on a disk the name says so."""
    return not remote.is_url(path) or ocp.path.step.is_path_finalized(path)


def newest_finished(folder: epath.PathLike) -> epath.Path | None:
    """The newest finished checkpoint in a folder `checkpoints/`."""
    steps = finished_steps(folder)
    return epath.Path(folder) / checkpoint_name(steps[-1]) if steps else None


def find_checkpoint(path: epath.PathLike) -> epath.Path:
    """The checkpoint that a path stands for, in every verb.

    That is `path` itself if it is named as one or is a link to one, else the newest in the folder
    (an imported model, a folder `checkpoints/`) or in its `checkpoints/` (a run). ValueError: there
    is none, or the folder holds both kinds.
    """
    if not str(path).strip():
        raise ValueError(f"the path of the checkpoint is empty; {REMEDY}")
    path = checkpoint_path(path)
    for named in (path, real_path(path)):
        if checkpoint_step(named.name) is not None:
            return named
    folders = (path, path / "checkpoints")
    found = [newest for folder in folders if (newest := newest_finished(folder))]
    if not found:
        raise ValueError(f"{path} is not a checkpoint and holds none; {REMEDY}")
    if len(found) > 1:
        both = " or ".join(map(str, found))
        raise ValueError(f"{path} holds checkpoints itself and in a run; name one: {both}")
    return found[0]


def real_path(path: epath.Path) -> epath.Path:
    """A path of this machine without links; a URL as it is."""
    return path if remote.is_url(path) else epath.Path(os.path.realpath(path))


def entries(folder: epath.PathLike) -> list[epath.Path]:
    """What lies in a folder; nothing where there is none, as behind a URL while it is empty."""
    try:
        return list(epath.Path(folder).iterdir())
    except FileNotFoundError:
        return []
