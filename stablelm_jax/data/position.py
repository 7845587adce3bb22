"""The place of a run in its data: from which step and row its batches are counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stablelm_jax.data.mixture import Mixture, quantise

Weights = Mapping[str, float]
Sizes = Sequence[tuple[int, int]]  # (step, rows of a batch from it on), the first from step 0


def size_changes(sizes: Sizes, first: int, last: int) -> list[tuple[int, int]]:
    """The part of `sizes` for the steps [first, last): its first begins at `first`."""
    ends = [*(step for step, _ in sizes[1:]), last]
    spans = ((max(step, first), min(end, last), rows) for (step, rows), end in zip(sizes, ends))
    return [(step, rows) for step, end, rows in spans if step < end]


@dataclasses.dataclass(frozen=True)
class DataPosition:
    """The step and row at which the present batch size and weights took over.

    A fresh run counts from step 0 and row 0, a branch from its parent's checkpoint, and a run that
    resumes with another batch size or other weights from where that happened. A checkpoint keeps
    these fields as `origin`.
    """

    # Later steps begin as many rows after `row` as the batches between them have.
    step: int = 0
    row: int = 0
    spans: Sequence[tuple[int, Mapping[str, int]]] = ()  # before `row`, those of its mixture
    parent: str = ""  # path of the checkpoint that a branch started from; '' for a run of its own
    parent_step: int = 0  # of that checkpoint, as is its `state_hash`
    parent_hash: str = ""

    @classmethod
    def of_checkpoint(cls, run: Mapping[str, Any]) -> DataPosition:
        """The position of the run that wrote this item `run`."""
        return cls(**run.get("origin", {}))

    def moved(self, run: Mapping[str, Any], **parent: Any) -> DataPosition:
        """This position once batch size or weights changed at the checkpoint with this `run`.

        `parent`: the fields of that name, where a branch began there.
        """
        spans = run["row_order"]["stages"]
        return dataclasses.replace(
            self, step=run["step"], row=run["rows_consumed"], spans=spans, **parent
        )

    def first_row(self, step: int, sizes: Sizes) -> int:
        """The row that step `step` (from 0) begins with; ValueError before this position."""
        if step < self.step:
            raise ValueError(
                f"step {step} lies before step {self.step}, where this run begins"
                f"{f' as a branch of {self.parent}' if self.parent else ''}"
            )
        spans = size_changes(sizes, self.step, step)
        ends = [*(begin for begin, _ in spans[1:]), step]
        return self.row + sum((end - begin) * rows for (begin, rows), end in zip(spans, ends))

    def mixture(
        self, weights: Weights, stages: Iterable[tuple[int, Weights]], sizes: Sizes
    ) -> Mixture:
        """The mixture of the whole run, the rows before this position included.

        `stages`: (step, weights) of each later stage.
        """
        now, later = quantise(weights), []
        for step, new in stages:
            if step <= self.step:
                now = quantise(new)
            else:
                later.append((self.first_row(step, sizes), quantise(new)))
        spans = [(first, dict(counts)) for first, counts in self.spans if first < self.row]
        if not spans or spans[-1][1] != now:  # else it goes on as if nothing had happened
            spans.append((self.row, now))
        return Mixture(spans + later)
