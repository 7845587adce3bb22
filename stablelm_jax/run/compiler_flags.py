"""What XLA is told. It reads `XLA_FLAGS` once, when its backend starts: to be called before."""

from __future__ import annotations

import os


def make_deterministic() -> None:
    """The same bits from the same operation each time, on a GPU too; what was given stays."""
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{given} --xla_gpu_deterministic_ops=true".strip()
