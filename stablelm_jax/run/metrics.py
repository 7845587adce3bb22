"""What a run writes down as it goes: metrics lines, samples, the picture of its losses."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from stablelm_jax.parallel import distributed
from stablelm_jax.run.events import Events
from stablelm_jax.run.folder import RunFolder
from stablelm_jax.storage.files import write_text
from stablelm_jax.storage.remote import described


class RunLog:
    """Writes to the run folder, and hands each metrics line to `writers`. Only process 0 writes."""

    def __init__(self, folder: RunFolder, events: Events, writers: Writers):
        self._folder, self._events, self.writers = folder, events, writers
        self._metrics = MetricsFile(folder.path / "metrics.jsonl")
        self._told: set[str] = set()

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
        """Appends one metrics line."""
        self._try("metrics", lambda: self._metrics.append(line))
        self.writers.write(line)

    def write_sample(self, name: str, text: str) -> None:
        """Writes `samples/<name>.txt`."""
        path = self._folder.path / "samples" / f"{name}.txt"
        self._try("samples", lambda: write_text(path, text))

    def draw(self, entropies: Mapping[str, float]) -> None:
        """Draws `loss.png`; `entropies`: the unigram entropy of each source in nats."""
        from stablelm_jax.reporting import picture  # the core never needs the shell

        path = self._folder.path / "loss.png"
        self._try(path.name, lambda: picture.draw_losses(self._metrics.read(), entropies, path))

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
        parsed = []
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines(True):
            line = None
            if text.endswith("\n"):
                with contextlib.suppress(ValueError):
                    line = json.loads(text)
            whole = isinstance(line, dict) and isinstance(line.get("step"), int)
            parsed.append(line if whole else None)
        return parsed

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

        Raises:
          OSError: the disk takes nothing more. The line is written with the next one.
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
    """TensorBoard and Weights & Biases, where the config switches them on (process 0 only)."""

    def __init__(self, config: ConfigDict, folder: RunFolder):
        """Raises ValueError if a writer is asked for but not installed."""
        self._config, self._folder = config, folder
        self._tensorboard = self._wandb = self._files = self._module = None
        if distributed.is_first() and config.writers.tensorboard:
            self._event = _imported("tensorboard.compat.proto.event_pb2").Event
            self._files = _imported("tensorboard.summary.writer.event_file_writer")
        if distributed.is_first() and config.writers.wandb:
            self._module = _imported("wandb")

    def open(self) -> None:
        """Begins to write: not before the run has begun, since this makes files and a W&B run."""
        config, folder = self._config, self._folder
        if self._files:
            self._tensorboard = self._files.EventFileWriter(str(folder.path / "tensorboard"))
        if self._module:
            self._wandb = self._module.init(
                project=config.writers.wandb_project,
                name=config.name,
                dir=str(folder.path),
                config=config.to_dict(),
                resume="allow",
            )

    def write(self, line: Mapping[str, Any]) -> None:
        """Writes the numbers of one metrics line at its step."""
        kept = {key: value for key, value in line.items() if key not in ("step", "time")}
        numbers = {key: value for key, value in kept.items() if isinstance(value, (int, float))}
        if self._tensorboard:
            values = [{"tag": key, "simple_value": value} for key, value in numbers.items()]
            summary = {"value": values}
            event = self._event(step=line["step"], wall_time=time.time(), summary=summary)
            self._tensorboard.add_event(event)
        if self._wandb:
            self._wandb.log(numbers, step=line["step"])

    def close(self, failed: bool = False) -> None:
        """Flushes and ends the writers. `failed`: an error ends the run, and stays visible."""
        with contextlib.suppress(*([Exception] if failed else [])):
            if self._tensorboard:
                self._tensorboard.close()
            if self._wandb:
                self._wandb.finish(exit_code=int(failed))


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        remedy = f"pip install {name}, or leave it off"
        raise ValueError(f"writers.{name} is on, but {name} is not installed; {remedy}") from error
