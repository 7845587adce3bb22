"""Where the steps and rows of a run are counted from: a fresh run, a branch, a changed batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from stablelm_jax import config as config_lib
from stablelm_jax.checkpoint.names import (
    checkpoint_name,
    checkpoint_path,
    checkpoint_step,
    finished_steps,
)
from stablelm_jax.checkpoint.reading import (
    CheckpointError,
    DamagedCheckpoint,
    read_run,
    state_hash,
)
from stablelm_jax.data.mixture import Mixture, continued, quantise


class NoCheckpoint(CheckpointError):
    """A folder has none that can be read."""


@dataclasses.dataclass(frozen=True)
class DataPosition:
    """The step and row at which the present batch size and weights took over.

    Attributes:
      step, row: step `step + n` begins at row `row + n * batch_size`.
      spans: the mixture before `row`, as `Mixture.spans` has it.
      parent: path of the checkpoint that a branch started from; '' for a run of its own.
      parent_step, parent_hash: of that checkpoint; the hash is `reading.state_hash`.
    """

    step: int = 0
    row: int = 0
    spans: tuple[tuple[int, dict[str, int]], ...] = ()
    parent: str = ""
    parent_step: int = 0
    parent_hash: str = ""

    @classmethod
    def of_checkpoint(cls, run: Mapping[str, Any]) -> DataPosition:
        """That of the run that wrote this item `run`."""
        saved = dict(run.get("origin", {}))
        saved["spans"] = _spans(saved.get("spans", ()))
        return cls(**saved)

    @classmethod
    def of_branch(cls, parent: str) -> DataPosition:
        """That of a new run which starts from the checkpoint `parent`.

        Raises:
          CheckpointError: it is missing or damaged.
          ConfigError: it holds weights alone.
        """
        run = read_run(parent)
        if "rows_consumed" not in run:
            raise config_lib.ConfigError(
                f"config.branch.parent={parent!r}: holds weights alone, imported from "
                f"{run['imported']['from']}: no moments and no place in the data to go on from"
            )
        return cls(
            step=run["step"],
            row=run["rows_consumed"],
            spans=_spans(run["row_order"]["stages"]),
            parent=str(parent),
            parent_step=run["step"],
            parent_hash=state_hash(run["checksums"]),
        )

    @classmethod
    def of_workdir(cls, workdir: str) -> DataPosition:
        """That of the run in a folder, by its newest readable checkpoint.

        Raises:
          NoCheckpoint: there is none.
        """
        folder = checkpoint_path(workdir) / "checkpoints"
        for step in reversed(finished_steps(folder)):
            try:
                return cls.of_checkpoint(read_run(folder / checkpoint_name(step)))
            except DamagedCheckpoint:
                continue  # who restores it says so
        raise NoCheckpoint(f"{workdir}: holds no checkpoint that can be read")

    @classmethod
    def of_config(cls, config: ConfigDict) -> DataPosition:
        """That of a run of `config` that has not begun."""
        return cls.of_branch(config.branch.parent) if config.branch.parent else cls()

    def moved(self, run: Mapping[str, Any]) -> DataPosition:
        """This one after the batch size or the weights changed at the checkpoint of `run`."""
        spans = _spans(run["row_order"]["stages"])
        return dataclasses.replace(self, step=run["step"], row=run["rows_consumed"], spans=spans)

    def to_json(self) -> dict[str, Any]:
        """What `of_checkpoint` reads back."""
        return dataclasses.asdict(self) | {"spans": [list(span) for span in self.spans]}

    def first_row(self, step: int, batch_size: int) -> int:
        """The row that step `step` (counted from 0) begins with.

        Raises:
          ValueError: that step lies before this origin.
        """
        if step < self.step:
            raise ValueError(
                f"step {step} lies before step {self.step}, where this run begins"
                f"{f' as a branch of {self.parent}' if self.parent else ''}"
            )
        return self.row + (step - self.step) * batch_size

    def mixture(self, config: ConfigDict) -> Mixture:
        """The mixture of the whole run, what lies before this origin included."""
        now, later = quantise(config_lib.mixture_weights(config)), []
        for step, weights in config_lib.mixture_stages(config):
            if step <= self.step:
                now = quantise(weights)
            else:
                later.append((self.first_row(step, config.data.batch_size), quantise(weights)))
        return Mixture.of_counts(continued(self.spans, self.row, now, later))


def _spans(saved: Any) -> tuple[tuple[int, dict[str, int]], ...]:
    return tuple((int(row), dict(counts)) for row, counts in saved)


def check_parent(config: ConfigDict) -> None:
    """Refuses a `branch.parent` that is no checkpoint, before anything else is done.

    Raises:
      ConfigError: with an example of what to write.
    """
    parent = config.branch.parent
    if parent and checkpoint_step(parent.rstrip("/").rsplit("/", 1)[-1]) is None:
        raise config_lib.ConfigError(
            f"config.branch.parent={parent!r}: is no checkpoint; write "
            "WORKDIR/checkpoints/global_stepN of the run to start from"
        )
