"""Where metrics go besides metrics.jsonl; run/metrics.py calls these and catches their errors."""

from __future__ import annotations

import importlib
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from stablelm_jax.storage.files import write_text
from stablelm_jax.storage.remote import described


class TensorBoard:
    """Event files in `tensorboard/`."""

    name = "TensorBoard"

    def __init__(self, config: ConfigDict, folder: Path):
        self._folder = folder / "tensorboard"
        self._events = _imported("tensorboard.compat.proto.event_pb2")
        self._files = _imported("tensorboard.summary.writer.event_file_writer")

    def open(self, step: int, *_: Any) -> None:
        self._file = self._files.EventFileWriter(str(self._folder))
        # A reader drops what files of earlier starts hold from this step on.
        self._add(step + 1, session_log={"status": self._events.SessionLog.START})

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        values = [{"tag": key, "simple_value": value} for key, value in numbers.items()]
        self._add(step, summary={"value": values})

    def _add(self, step: int, **content: Any) -> None:
        self._file.add_event(self._events.Event(step=step, wall_time=time.time(), **content))
        self._file.flush()  # the next start goes on after these lines, however this one ends

    def close(self, failed: bool) -> None:
        self._file.close()


class WeightsAndBiases:
    """One W&B run for all starts of a run.

    W&B refuses a step below its last, but a run that was killed does some steps again: here `step`
    is a value like the others, and the axis of their plots.
    """

    name = "Weights & Biases"

    def __init__(self, config: ConfigDict, folder: Path):
        self._config, self._folder, self._module = config, folder, _imported("wandb")

    def open(self, step: int, wandb_id: str | None, resumed: bool) -> str:
        note = self._folder / "wandb_id"
        if resumed and not wandb_id and note.exists():
            wandb_id = note.read_text(encoding="utf-8").strip()
        wandb_id = wandb_id or secrets.token_hex(4)
        note.parent.mkdir(parents=True, exist_ok=True)
        write_text(note, wandb_id + "\n")
        # It would try to upload for as long as that takes; `wandb sync` can do it later.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")
        self._run = self._module.init(
            project=self._config.writers.wandb_project,
            name=self._config.name,
            dir=str(self._folder),
            config=self._config.to_dict(),
            id=wandb_id,
            resume="allow",
        )
        self._run.define_metric("*", step_metric="step")
        return wandb_id

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}  # by the field of the config


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # one that does not fit the others raises its own
        name = module.partition(".")[0]
        remedy = f"pip install {name}, or leave it off"
        raise ValueError(f"writers.{name} is on, but {described(error)}; {remedy}") from error
