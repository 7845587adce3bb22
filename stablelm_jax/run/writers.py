"""Scalars for TensorBoard and Weights & Biases, each when asked for and installed."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from stablelm_jax.parallel import distributed
from stablelm_jax.run.folder import RunFolder


class Writers:
    """Hands every metrics line to the writers that the config switches on (process 0 only)."""

    def __init__(self, config: ConfigDict, folder: RunFolder):
        """Raises ValueError if a writer is asked for but not installed."""
        self._writers: list[_TensorBoard | _WeightsAndBiases] = []
        if distributed.is_first() and config.writers.tensorboard:
            self._writers.append(_TensorBoard(folder))
        if distributed.is_first() and config.writers.wandb:
            self._writers.append(_WeightsAndBiases(config, folder))

    def write(self, line: Mapping[str, Any]) -> None:
        """Writes the numbers of one metrics line at its step."""
        kept = {key: value for key, value in line.items() if key not in ("step", "time")}
        numbers = {key: value for key, value in kept.items() if isinstance(value, (int, float))}
        for writer in self._writers:
            writer.write(line["step"], numbers)

    def close(self) -> None:
        """Flushes and ends the writers."""
        for writer in self._writers:
            writer.close()


class _TensorBoard:
    def __init__(self, folder: RunFolder):
        writer = _imported("tensorboard.summary.writer.event_file_writer")
        self._event = _imported("tensorboard.compat.proto.event_pb2").Event
        self._summary = _imported("tensorboard.compat.proto.summary_pb2").Summary
        self._file = writer.EventFileWriter(str(folder.path / "tensorboard"))
        self.close = self._file.close

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=k, simple_value=v) for k, v in numbers.items()]
        event = self._event(step=step, wall_time=time.time(), summary=self._summary(value=values))
        self._file.add_event(event)


class _WeightsAndBiases:
    def __init__(self, config: ConfigDict, folder: RunFolder):
        self._run = _imported("wandb").init(
            project=config.writers.wandb_project,
            name=config.name,
            dir=str(folder.path),
            config=config.to_dict(),
            resume="allow",
        )
        self.close = self._run.finish

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        remedy = f"pip install {name}, or leave it off"
        raise ValueError(f"writers.{name} is on, but {name} is not installed; {remedy}") from error
