"""The checkpoints of a run: which there are, which stay, and how one is taken away.

Orbax writes them (see `saving`). Its own manager is not used, since it counts a save that failed
among its newest checkpoints.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import logging
from etils import epath
from orbax.checkpoint.path import step as orbax_step

from stablelm_jax.checkpoint import names
from stablelm_jax.checkpoint.names import checkpoint_name, checkpoint_step
from stablelm_jax.parallel import distributed
from stablelm_jax.storage.files import flush_to_disk, free_name, what_is
from stablelm_jax.storage.remote import described, is_url

_TEMPORARY = orbax_step.TMP_DIR_SUFFIX  # in the name of a save that is under way
_COMMIT_MARK = "commit_success.txt"  # this file makes a folder behind a URL a checkpoint
_DELETING = ".deleting"


class CheckpointStore:
    """The finished checkpoints in the folder `checkpoints/` of a run.

    Every process of a run calls every method, in the same order; process 0 renames and deletes.
    What cannot be deleted or renamed is told, and stops neither a start nor a run.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        keep_latest: int,
        keep_every: int | None = None,
        tell: Callable[..., None] = lambda event, text: logging.error(text),
    ):
        """Opens `folder`, or makes it; ValueError if a file or a link into nothing is there.

        `keep_latest` and `keep_every` are those of the config, `tell` is `Events.tell`.
        """
        self.folder = names.checkpoint_path(folder)
        self._keep_latest, self._keep_every, self._tell = keep_latest, keep_every, tell
        self._first, self._kept = distributed.is_first(), set()
        self.unfinished: list[str] = []  # saves that an earlier start did not finish: now removed
        found = []
        with distributed.together_or_not():
            if self._first:
                if (what := what_is(self.folder)) not in ("", "a folder"):
                    remedy = "give the folder back (is a disk not mounted?), or another --workdir"
                    raise ValueError(f"{self.folder} is {what}; {remedy}")
                self.folder.mkdir(parents=True, exist_ok=True)
                self._clean_up()
                found = names.finished_steps(self.folder)
        self._steps = set(distributed.gathered(found)[0])

    def _clean_up(self) -> None:
        """Removes what an interrupted save or deletion left."""
        for path in sorted(names.entries(self.folder)):
            name, dot, _ = path.name.partition(".")
            if checkpoint_step(name) is None:
                continue
            unfinished = _TEMPORARY in path.name or (not dot and not names.is_finished(path))
            if unfinished or path.name.endswith(_DELETING):
                removed = self._try(f"{path} was not removed", lambda path=path: _remove(path))
                if unfinished and removed:
                    self.unfinished.append(name)

    def _try(self, failure: str, action: Callable[[], Any]) -> bool:
        """Whether it worked; if not, it is told."""
        try:
            action()
        except Exception as error:  # of the disk, or the driver's own
            self._tell("not_tidied", f"{failure} ({described(error)}); the run goes on")
            return False
        return True

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        return sorted(self._steps)

    def keep(self, step: int) -> None:
        """This step is never deleted by this store, however many newer ones there are."""
        self._kept.add(step)

    def set_aside(self, step: int, ending: str = ".damaged") -> str:
        """Gives a checkpoint a name under which no run finds it; returns the name."""
        path = self.folder / checkpoint_name(step)
        target = free_name(path, ending)
        self._steps.discard(step)
        if self._first and not self._try(f"{path} kept its name", lambda: path.rename(target)):
            return path.name
        return target.name

    def add(self, step: int) -> None:
        """The checkpoint of this step is whole; older ones that need not stay are deleted."""
        self._steps.add(step)
        new = self.folder / checkpoint_name(step)
        if self._first and not is_url(new):
            # Orbax leaves its small files to the system; the older checkpoints stay until then.
            failure = f"{new} may be lost with the power"
            if not self._try(failure, lambda: flush_to_disk(Path(new))):
                return
        for old in self.steps()[: -self._keep_latest]:
            if old in self._kept or (self._keep_every and old % self._keep_every == 0):
                continue
            self._steps.discard(old)
            if self._first:
                path = self.folder / checkpoint_name(old)
                self._try(f"{path} was not deleted", lambda path=path: _delete(path))

    def remove_unfinished(self, step: int) -> None:
        """Removes what a save that failed has written; what it cannot, the next start removes."""
        if not self._first:
            return
        path = self.folder / checkpoint_name(step)
        for temporary in self.folder.glob(f"{path.name}{_TEMPORARY}*"):
            for _ in range(20):  # other threads of the save may still write for a moment
                with contextlib.suppress(OSError):
                    temporary.rmtree(missing_ok=True)
                    break
                time.sleep(0.1)
        # Behind a URL nothing is renamed: half a checkpoint already has the name of a whole one.
        if is_url(path) and path.exists() and not orbax_step.is_path_finalized(path):
            path.rmtree()


def _delete(path: epath.Path) -> None:
    """Deletes a checkpoint so that no half of it is taken for one, whenever the process ends."""
    if is_url(path):
        (path / _COMMIT_MARK).unlink(missing_ok=True)
    elif not os.path.islink(path):
        path = path.rename(path.with_name(path.name + _DELETING))
    _remove(path)


def _remove(path: epath.Path) -> None:
    """Removes a folder or file; of a link only the link: what it leads to was moved on purpose."""
    if not is_url(path) and (os.path.islink(path) or os.path.isfile(path)):
        path.unlink()
    else:
        path.rmtree()
