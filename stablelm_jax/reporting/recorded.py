"""A run as two of them are compared: what it read, and its losses by document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from stablelm_jax.checkpoint.names import checkpoint_name, finished_steps
from stablelm_jax.checkpoint.reading import CheckpointError, read_run
from stablelm_jax.reporting.run_record import RunRecord
from stablelm_jax.training.held_out import Documents

# What the order of rows follows from, beside data and mixture.
_ORDER = ("seed", "sequence_length", "loss_on_first_token", "packing", "loss_on")


class RecordedRun(RunRecord):
    """A run folder whose metrics hold a step.

    Attributes:
      item: the item `run` of the newest checkpoint that can be read; {} without one.
      steps: those with a line of metrics, ascending; not of evaluations, which have lines too.
    """

    def __init__(self, folder: str):
        """ValueError: it holds no metrics of a step."""
        super().__init__(folder)
        self._seen = self.curves["tokens_seen"]
        if not self._seen:
            raise ValueError(
                f"{folder}: no metrics of a step in its metrics.jsonl; name the --workdir of a run "
                "that has begun"
            )
        self.steps, self.item = self._seen.steps, _newest_item(self.folder / "checkpoints")

    @property
    def planned_steps(self) -> int:
        """Where the run ends."""
        return self.config.get("training.num_steps", 0)

    def order(self) -> dict[str, Any]:
        """What the order of its rows follows from, beside data and mixture."""
        order = self.item.get("row_order") or {
            key.removeprefix("data."): value for key, value in self.config.items()
        }
        return {key: order.get(key) for key in _ORDER}

    def column(self, key: str) -> np.ndarray:
        """A value at each of `steps`, NaN where there is none: float64 [steps]."""
        return self.curves.errors(key, self._seen)

    def tokens_at(self, step: int) -> float:
        """Tokens read up to a step, between lines as if evenly."""
        steps, tokens = self._seen
        if step < steps[0]:
            steps, tokens = np.insert(steps, 0, 0.0), np.insert(tokens, 0, 0.0)
        return float(np.interp(step, steps, tokens))

    def evaluated(self) -> list[int]:
        """The steps whose losses are kept by document."""
        prefix = checkpoint_name(0)[:-1]
        files = (self.folder / "held_out").glob(f"{prefix}*.json")
        names = [path.stem.removeprefix(prefix) for path in files]
        steps = sorted(int(name) for name in names if name.isdecimal())
        return [step for step in steps if step <= self.step]  # a later one was cut back

    def documents(self, step: int) -> Documents:
        """What an evaluation kept; {} where it cannot be read."""
        return self._json(f"held_out/{checkpoint_name(step)}.json")


def _newest_item(checkpoints: Any) -> Mapping[str, Any]:
    for step in reversed(finished_steps(checkpoints) if checkpoints.is_dir() else []):
        try:
            return read_run(checkpoints / checkpoint_name(step))
        except CheckpointError:
            continue  # an older one says the same of its run
    return {}
