"""What a metrics line says beside the losses: norms, ledger, speed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from stablelm_jax.model.flops import train_flops_per_token
from stablelm_jax.parallel.chips import peak_flops
from stablelm_jax.training.setup import Run

_SCALARS = ("learning_rate", "grad_norm", "param_norm", "updates_skipped")


class Meter:
    """Adds up between two lines.

    Attributes:
      steps: since the last line.
      seconds, wait_seconds: spent in them, and of these on waiting for data.
    """

    def __init__(self, run: Run):
        self._run = run
        self.steps, self.seconds, self.wait_seconds = 0, 0.0, 0.0

    def line(self, scalars: Mapping[str, Any], rows: int) -> dict[str, Any]:
        """The part of a line after `rows` rows; starts again from zero.

        `scalars`: those of the step's metrics, on the host.
        """
        ledger = self._run.tokens_by_source(rows)
        line = {
            **{key: scalars[key].item() for key in _SCALARS},
            "tokens_seen": sum(ledger.values()),
            **{f"tokens/{name}": tokens for name, tokens in ledger.items()},
            **{
                f"epochs/{name}": ledger[name] / manifest.train.tokens
                for name, manifest in self._run.manifests.items()
            },
            **self._speed(),
        }
        self.steps, self.seconds, self.wait_seconds = 0, 0.0, 0.0
        return line

    def _speed(self) -> dict[str, float | None]:
        spec, steps = self._run.spec, self.steps
        rate = steps * spec.batch_size * spec.sequence_length / self.seconds
        per_device = rate / jax.device_count()
        peak = peak_flops(jax.devices()[0])

        def mfu(causal: bool) -> float | None:
            flops = train_flops_per_token(self._run.model, spec.sequence_length, causal=causal)
            return None if peak is None else per_device * flops / peak

        return {
            "tokens_per_second": rate,
            "tokens_per_second_per_device": per_device,
            "mfu": mfu(causal=False),
            "mfu_causal": mfu(causal=True),
            "data_wait_seconds": self.wait_seconds / steps,
            "step_seconds": self.seconds / steps,
        }
