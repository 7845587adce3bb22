"""What a run writes down as it goes: metrics lines, samples, the picture of its losses.

Only process 0 writes. A disk that takes nothing more ends no run; it is told once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from stablelm_jax.parallel import distributed
from stablelm_jax.run.events import Events
from stablelm_jax.run.folder import RunFolder
from stablelm_jax.run.writers import Writers


class RunLog:
    """Writes to the run folder, and hands each metrics line to the writers of the config."""

    def __init__(self, folder: RunFolder, events: Events, writers: Writers):
        self._folder, self._events, self._writers = folder, events, writers
        self._first = distributed.is_first()
        self._told: set[str] = set()

    def cut_back(self, step: int) -> list[dict[str, Any]]:
        """Drops the metrics lines past `step`, which the run writes again; returns what stays."""
        if not self._first:
            return []
        kept, broken = self._folder.metrics.cut_back(step)
        if broken:
            text = f"{self._folder.metrics.path}: {broken} broken line(s) removed"
            self._events.tell("metrics_repaired", text, lines=broken)
        return kept

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends one metrics line."""
        if self._first:
            with self._disk_may_be_full("metrics"):
                self._folder.metrics.append(line)
            self._writers.write(line)

    def write_sample(self, name: str, text: str) -> None:
        """Writes `samples/<name>.txt`."""
        if self._first:
            with self._disk_may_be_full("samples"):
                self._folder.write_sample(name, text)

    def draw(self, entropies: Mapping[str, float]) -> None:
        """Draws `loss.png`; `entropies`: the unigram entropy of each source in nats."""
        if self._first:
            from stablelm_jax.reporting import picture  # matplotlib takes a second to import

            with self._disk_may_be_full("loss.png"):
                lines = self._folder.metrics.read()
                picture.draw_losses(lines, entropies, self._folder.loss_picture)

    def flush(self) -> None:
        """Returns when the lines so far are on the disk, and where the run folder is."""
        if self._first:
            with self._disk_may_be_full("metrics"):
                self._folder.metrics.flush_to_disk()
            self._folder.upload()

    def close(self) -> None:
        """Flushes the writers."""
        self._writers.close()

    @contextlib.contextmanager
    def _disk_may_be_full(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if what not in self._told:
                self._told.add(what)
                text = f"{what} cannot be written ({error}); the run goes on"
                self._events.tell("disk", text, style="bold red")
