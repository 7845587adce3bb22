"""Scalars for TensorBoard and Weights & Biases, each when asked for and installed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from stablelm_jax.run.folder import RunFolder


class Writers:
    """Hands every metrics line to the writers that the config switches on (process 0 only)."""

    def __init__(self, config: ConfigDict, folder: RunFolder):
        """Raises ValueError if a writer is asked for but not installed."""
        self._writers = []
        if jax.process_index() != 0:
            return
        if config.writers.tensorboard:
            self._writers.append(_TensorBoard(folder))
        if config.writers.wandb:
            self._writers.append(_WeightsAndBiases(config, folder))

    def write(self, line: Mapping[str, Any]) -> None:
        """Writes the numbers of one metrics line at its step."""
        numbers = {
            key: value
            for key, value in line.items()
            if key not in ("step", "time") and isinstance(value, (int, float))
        }
        for writer in self._writers:
            writer.write(line["step"], numbers)

    def close(self) -> None:
        """Flushes."""
        for writer in self._writers:
            writer.close()


class _TensorBoard:
    def __init__(self, folder: RunFolder):
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ValueError(
                "writers.tensorboard is on, but tensorboard is not installed; "
                "pip install tensorboard, or leave it off"
            ) from error
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._file = EventFileWriter(str(folder.path / "tensorboard"))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=k, simple_value=v) for k, v in numbers.items()]
        event = self._event(step=step, wall_time=time.time(), summary=self._summary(value=values))
        self._file.add_event(event)

    def close(self) -> None:
        self._file.close()


class _WeightsAndBiases:
    def __init__(self, config: ConfigDict, folder: RunFolder):
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "writers.wandb is on, but wandb is not installed; "
                "pip install wandb, or leave it off"
            ) from error
        self._run = wandb.init(
            project=config.writers.wandb_project,
            name=config.name,
            dir=str(folder.path),
            config=config.to_dict(),
            resume="allow",
        )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()
