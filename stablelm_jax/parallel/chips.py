"""Peak FLOP/s."""

from __future__ import annotations

from collections.abc import Mapping

import jax

PEAK_TFLOPS: Mapping[str, float] = {
    "A100": 312.0,
    "H100": 989.0,
    "H200": 989.0,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5p": 459.0,
    "TPU v5": 459.0,
    "TPU v6 lite": 918.0,
}


def peak_flops(device: jax.Device) -> float | None:
    """FLOP/s of a chip in bfloat16; None where unknown (CPU among them)."""
    for part, tflops in PEAK_TFLOPS.items():
        if part in device.device_kind:
            return tflops * 1e12
    return None
