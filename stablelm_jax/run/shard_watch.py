"""Refuses to go on with shards whose bytes have changed since the run began."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from stablelm_jax.data import fingerprints
from stablelm_jax.data.manifest import Source
from stablelm_jax.parallel import distributed
from stablelm_jax.storage.files import write_json


class ShardWatch:
    """Looks when a run starts and before each of its checkpoints: what is saved read whole data.

    What a start of the run saw is in the run folder's `shards.json`, for the next one. Hosts other
    than process 0's may have copies of their own, which they watch while they run.
    """

    def __init__(
        self,
        path: Path,
        sources: Mapping[str, Source],
        progress: Callable[[str], None],
        enabled: bool,
    ):
        self._path, self._sources, self._progress = path, sources, progress
        self._enabled, self._stamps = enabled, {}

    def start(self) -> None:
        """Compares with what the start before saw.

        Raises:
          ShardError: on every process, where a shard has changed.
        """
        if distributed.is_first() and self._path.exists():
            try:
                self._stamps = json.loads(self._path.read_text(encoding="utf-8"))
            except ValueError:
                self._progress(f"{self._path} is broken: the shards are taken as they are now")
        self.look()

    def look(self) -> None:
        """Compares with what was seen last; costs one look at each file's size and time.

        Raises:
          ShardError: on every process, where a shard has changed.
        """
        if not self._enabled:
            return
        error = None
        try:
            seen = fingerprints.check(self._sources, self._stamps, self._progress)
        except ValueError as caught:
            error = caught
        if distributed.anywhere(error is not None):
            raise error or ValueError("a shard has changed on another host; see its output")
        if seen != self._stamps and distributed.is_first():
            write_json(self._path, seen)
        self._stamps = seen
