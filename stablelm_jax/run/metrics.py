"""What a run writes down as it goes: metrics lines, samples, the picture of its losses."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson
from ml_collections import ConfigDict

from stablelm_jax.parallel import distributed
from stablelm_jax.run.events import Events
from stablelm_jax.run.folder import RunFolder
from stablelm_jax.run.goodput import Goodput
from stablelm_jax.storage.files import write_text
from stablelm_jax.storage.remote import described


class RunLog:
    """Writes to the run folder, and hands each metrics line to `writers`. Only process 0 writes."""

    def __init__(self, folder: RunFolder, events: Events, writers: Writers, goodput: Goodput):
        self._folder, self._events, self.writers = folder, events, writers
        self._goodput = goodput
        self._metrics = MetricsFile(folder.path / "metrics.jsonl")
        self._told: set[str] = set()
        self._curves = None

    def cut_back(self, step: int) -> list[dict[str, Any]]:
        """Drops the metrics lines past `step`, which the run writes again; returns what stays."""
        if not distributed.is_first():
            return []
        kept, broken = self._metrics.cut_back(step)
        if broken:
            text = f"{self._metrics.path}: {broken} broken line(s) removed"
            self._events.tell("metrics_repaired", text, lines=broken)
        return kept

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends one metrics line, with the seconds of the run by cause."""
        line = {**line, **self._goodput.line()}
        self._try("metrics", lambda: self._metrics.append(line))
        self.writers.write(line)
        self._goodput.keep()

    def write_sample(self, name: str, text: str) -> None:
        """Writes `samples/<name>.txt`."""
        path = self._folder.path / "samples" / f"{name}.txt"
        self._try("samples", lambda: write_text(path, text))

    def write_held_out(self, name: str, documents: Mapping[str, Any]) -> None:
        """Writes `held_out/<name>.json`: the losses of each held-out document."""
        path = self._folder.path / "held_out" / f"{name}.json"

        def write() -> None:
            path.parent.mkdir(exist_ok=True)
            write_text(path, json.dumps(finite(dict(documents))) + "\n")

        self._try("held_out", write)

    def draw(self, entropies: Mapping[str, float | None]) -> None:
        """Draws `loss.png`; `entropies`: the unigram entropy of each source in nats, or None."""
        from stablelm_jax.reporting import picture  # the core never needs the shell

        path = self._folder.path / "loss.png"
        self._try(path.name, lambda: picture.draw_losses(self._read_curves(), entropies, path))

    def write_page(self) -> None:
        """Writes `report.html`, the page of the run so far."""
        from stablelm_jax.reporting import page  # as above

        path = self._folder.path / page.PAGE

        def write() -> None:
            page.write_page([self._folder.path], path, self._read_curves())

        self._try(path.name, write)

    def _read_curves(self) -> Any:
        """The metrics so far; of a long file only what is new is read."""
        from stablelm_jax.reporting.curves import Curves  # as above

        self._curves = Curves() if self._curves is None else self._curves
        self._curves.update(self._metrics.path)
        return self._curves

    def flush(self) -> None:
        """Returns when the lines so far are on the disk, and where the run folder is."""
        self._try("metrics", self._metrics.flush_to_disk)
        if distributed.is_first():
            self._folder.upload()

    def _try(self, what: str, write: Callable[[], None]) -> None:
        """What only informs does not end the run, as where the disk is full; it is told once."""
        try:
            if distributed.is_first():
                write()
        except Exception as error:  # of the disk, or of the library that draws
            if what not in self._told:
                self._told.add(what)
                text = f"{what} cannot be written ({described(error)}); the run goes on"
                self._events.tell("disk", text, style="bold red")


def finite(value: Any) -> Any:
    """`value` with None for each number in it that JSON lacks: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_line(text: bytes) -> dict[str, Any] | None:
    """A line of `metrics.jsonl`, without NaN; None for one that is not whole."""
    line = None
    if text.endswith(b"\n"):
        try:
            line = orjson.loads(text)
        except ValueError:  # ours takes longer, and what other software writes: NaN
            with contextlib.suppress(ValueError, RecursionError):
                line = finite(json.loads(text.decode(errors="replace")))
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, appended, whole lines only."""

    def __init__(self, path: Path):
        self.path = path
        self._unwritten: list[str] = []

    def read(self) -> list[dict[str, Any]]:
        """The whole lines; one that a crash cut short or filled with zeros is left out."""
        return [line for line in self._parsed() if line is not None]

    def _parsed(self) -> list[dict[str, Any] | None]:
        """Every line of the file; None for one that is not whole."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            return [parse_line(text) for text in file]

    def cut_back(self, step: int) -> tuple[list[dict[str, Any]], int]:
        """Drops the lines past `step` and broken ones; returns the others, and how many broke."""
        parsed = self._parsed()
        kept = [line for line in parsed if line is not None and line["step"] <= step]
        write_text(self.path, "".join(map(_as_line, kept)))
        return kept, parsed.count(None)

    def flush_to_disk(self) -> None:
        """Returns when a loss of power takes no line that was written."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes one line; values that are not finite become null.

        After an OSError (a full disk) the line is written with the next one.
        """
        self._unwritten.append(_as_line(finite(dict(line))))
        if len(self._unwritten) > 1:  # the last time left half a line, or none
            self.cut_back(2**62)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(self._unwritten))
        self._unwritten.clear()


def _as_line(line: Mapping[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


class Writers:
    """TensorBoard and Weights & Biases, where the config switches them on (process 0 only).

    They only inform: one that fails (disk, network, version) is told and left off.
    """

    def __init__(self, config: ConfigDict, folder: RunFolder, events: Events | None = None):
        """Raises ValueError if a writer is asked for but not installed."""
        from stablelm_jax.reporting.trackers import TRACKERS  # the core never needs the shell

        wanted = [kind for name, kind in TRACKERS.items() if config.writers[name]]
        self._wanted = [kind(config, folder.path) for kind in wanted if distributed.is_first()]
        self._writers, self._events = [], events

    def open(self, step: int = 0, wandb_id: str | None = None, resumed: bool = False) -> str | None:
        """Begins to write: not before the run has begun, since this makes files and a W&B run.

        Lines after `step` are written now, some of them maybe again. `wandb_id`: of the checkpoint
        that is gone on from; returned for the next ones. `resumed`: the run has begun earlier.
        """
        self._writers = self._wanted
        return next(filter(None, self._each("open", step, wandb_id, resumed)), wandb_id)

    def write(self, line: Mapping[str, Any]) -> None:
        """Writes the numbers of one metrics line at its step."""
        kept = {key: value for key, value in line.items() if key not in ("step", "time")}
        numbers = {key: value for key, value in kept.items() if isinstance(value, (int, float))}
        self._each("write", line["step"], numbers)

    def close(self, failed: bool = False) -> None:
        """Flushes and ends the writers. `failed`: an error ends the run."""
        self._each("close", failed)

    def _each(self, action: str, *arguments: Any) -> list[Any]:
        done = []
        for writer in list(self._writers):
            try:
                done.append(getattr(writer, action)(*arguments))
            except Exception as error:  # each raises its own
                self._writers.remove(writer)
                text = f"{writer.name} failed ({described(error)}); the run goes on without it"
                if self._events is not None:
                    self._events.tell("writer_failed", text, style="bold red", writer=writer.name)
        return done
