"""What a metrics line says: losses by source, norms, the token ledger, speed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from stablelm_jax.model.flops import train_flops_per_token
from stablelm_jax.parallel.chips import peak_flops
from stablelm_jax.run.goodput import Goodput
from stablelm_jax.run.metrics import finite
from stablelm_jax.training.begin import Progress
from stablelm_jax.training.objectives import Objective, means, sum_names
from stablelm_jax.training.setup import Run

_SCALARS = ("learning_rate", "grad_norm", "param_norm", "updates_skipped")


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An update that was left out."""

    step: int  # of the metrics: the update that would have led to it
    why: int  # the step's "skipped"
    sources: dict[str, float | None]  # mean loss of those in its batch; None: not finite
    grad_norm: float
    in_a_row: int  # how many were left out without one between them, this one included


class LossSums:
    """The objective's sums by source since the last metrics line, of the updates applied.

    Steps add device arrays, which are fetched only when a line is due; the sums are kept in
    float64, whose text in a checkpoint is exact, so that a resumed run prints the same mean.

    Attributes:
      in_a_row: how many of the last updates were left out.
      before_row: `state()` before the first of these, or None.
    """

    def __init__(
        self, objective: Objective, sources: Sequence[str], saved: Mapping[str, Any] | None = None
    ):
        self._objective, self._sources = objective, list(sources)
        self._pending: list[tuple[int, Mapping[str, jax.Array]]] = []
        saved = saved or {}
        self._sums = {
            key: np.array([saved.get(key, {}).get(name, 0.0) for name in sources], np.float64)
            for key in sum_names(objective)
        }
        self.in_a_row: int = saved.get("in_a_row", 0)
        self.before_row: dict[str, Any] | None = saved.get("before_row")
        self._skipped: list[Skipped] = []

    def add(self, step: int, step_metrics: Mapping[str, jax.Array]) -> None:
        """Adds one step's sums, float32 [S]; does not wait for the device."""
        kept = (*self._sums, "skipped", "grad_norm")
        self._pending.append((step, {key: step_metrics[key] for key in kept}))

    def _fetch(self) -> None:
        for step, found in jax.device_get(self._pending):
            if found["skipped"]:
                self._skip(step, found)
                continue
            self.in_a_row, self.before_row = 0, None
            for key, sums in self._sums.items():
                sums += found[key]
        self._pending.clear()

    def _skip(self, step: int, found: Mapping[str, Any]) -> None:
        if not self.in_a_row:
            self.before_row = self._by_source()
        self.in_a_row += 1
        found = {key: np.float64(value) for key, value in found.items()}
        with np.errstate(invalid="ignore"):  # a loss that is not finite
            loss_of = means(self._objective, self._sources, found)
        losses = {s: finite(loss_of[f"loss/{s}"]) for s in self._sources if f"loss/{s}" in loss_of}
        norm = float(found["grad_norm"])
        self._skipped.append(Skipped(step, int(found["skipped"]), losses, norm, self.in_a_row))

    def take_skipped(self) -> list[Skipped]:
        """The updates left out since the last call; waits for the devices."""
        self._fetch()
        taken, self._skipped = self._skipped, []
        return taken

    def state(self) -> dict[str, Any]:
        """The sums as JSON values, for the checkpoint."""
        self._fetch()
        row = {"in_a_row": self.in_a_row, "before_row": self.before_row} if self.in_a_row else {}
        return self._by_source() | row

    def _by_source(self) -> dict[str, Any]:
        return {key: dict(zip(self._sources, sums.tolist())) for key, sums in self._sums.items()}

    def take(self) -> dict[str, float | None]:
        """The objective's metrics, as `objectives.means` has them; starts again from zero."""
        self._fetch()
        found = means(self._objective, self._sources, self._sums)
        for sums in self._sums.values():
            sums[:] = 0.0
        return found


def _memory() -> dict[str, float]:
    """Of the fullest device of this process, now and at most so far; {} where it tells nothing."""
    found = [device.memory_stats() or {} for device in jax.local_devices()]
    keys = {"memory/in_use_gib": "bytes_in_use", "memory/peak_gib": "peak_bytes_in_use"}
    return {
        key: max(stats[name] for stats in found) / 2**30
        for key, name in keys.items()
        if all(name in stats for stats in found)
    }


class Meter:
    """Steps since the last line, seconds spent in them, and of these on waiting for data."""

    def __init__(self, run: Run, goodput: Goodput):
        self._run, self._goodput = run, goodput
        self.steps, self._before = 0, goodput.seconds()

    def line(self, scalars: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        """The part of a line after `progress`; starts again from zero.

        `scalars`: those of the step's metrics, on the host.
        """
        ledger = progress.ledger(self._run)
        given = self._run.tokens_by_source(progress.rows_consumed)
        whole = self._run.tokens_per_epoch.items()
        line = {key: scalars[key].item() for key in _SCALARS}
        line["tokens_seen"] = sum(ledger.values())
        line |= {f"tokens/{name}": tokens for name, tokens in ledger.items()}
        line |= {f"epochs/{name}": given[name] / tokens for name, tokens in whole}
        now, before = self._goodput.seconds(), self._before
        wait, step = (now[cause] - before[cause] for cause in ("data_wait", "step"))
        line |= self._speed(progress.step, wait + step, wait) | _memory()
        self.steps, self._before = 0, now
        return line

    def _speed(self, step: int, seconds: float, wait_seconds: float) -> dict[str, float | None]:
        run, steps, length = self._run, self.steps, self._run.spec.sequence_length
        rows = [run.first_row(n + 1) - run.first_row(n) for n in range(step - steps, step)]
        lengths = [length // run.pieces(n) for n in range(step - steps, step)]
        rate = sum(rows) * length / seconds
        per_device = rate / jax.device_count()
        peak = peak_flops(jax.devices()[0].device_kind)

        def mfu(causal: bool) -> float | None:
            flops = [train_flops_per_token(run.model, n, causal=causal) for n in lengths]
            mean = np.average(flops, weights=rows).item()
            return None if peak is None else per_device * mean / peak

        return {
            "tokens_per_second": rate,
            "tokens_per_second_per_device": per_device,
            "mfu": mfu(causal=False),
            "mfu_causal": mfu(causal=True),
            "data_wait_seconds": wait_seconds / steps,
            "step_seconds": seconds / steps,
        }
