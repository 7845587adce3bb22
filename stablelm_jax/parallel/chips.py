"""The peak speed of every chip that we know, by its name in jax: what MFU is measured by.

`peak_tflops.json` has the dense bfloat16 TFLOP/s of one jax device, with sums kept in float32, by
its device_kind without size and form factor. Data sheets print twice as much "with sparsity"; of a
GeForce card, float16 sums are twice as fast too, and neither is what we compute with.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

PEAKS = json.loads(Path(__file__).with_name("peak_tflops.json").read_text(encoding="utf-8"))

# As in "NVIDIA A100-SXM4-40GB" and "NVIDIA H100 80GB HBM3". A word that is not here, as "Laptop" or
# "Ti", names another chip, whose MFU is unknown rather than wrong.
_FORM = r"([ -](SXM\d?|PCIE?|\d+GB|HBM\d\w?))*"


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device; None for a CPU and for a chip that is not in the table."""
    for name in sorted(PEAKS, key=len, reverse=True):  # the PCIe card has a row of its own
        if re.fullmatch(re.escape(name) + _FORM, device_kind, re.IGNORECASE):
            return PEAKS[name]["tflops"] * 1e12
    return None
