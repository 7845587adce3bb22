"""The peak speed of every chip that we know, by its name in jax: what MFU is measured by."""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax

# device_kind without its size and form factor -> dense bfloat16 TFLOP/s of one jax device, sums
# kept in float32, and the source. Data sheets print twice as much "with sparsity"; of a GeForce
# card, float16 sums are twice as fast too, and neither is what we compute with.
PEAK_TFLOPS: Mapping[str, tuple[float, str]] = {
    "NVIDIA A100": (312, "NVIDIA A100 data sheet"),
    "NVIDIA H100": (989, "NVIDIA H100 data sheet, SXM: 1,979 with sparsity"),
    "NVIDIA H100 PCIe": (756, "NVIDIA H100 data sheet, PCIe: 1,513 with sparsity"),
    "NVIDIA H100 NVL": (835, "NVIDIA H100 NVL data sheet: 1,671 with sparsity"),
    "NVIDIA H200": (989, "NVIDIA H200 data sheet, SXM: 1,979 with sparsity"),
    "NVIDIA H200 NVL": (835, "NVIDIA H200 data sheet, NVL: 1,671 with sparsity"),
    "NVIDIA GH200": (989, "NVIDIA GH200 data sheet: 1,979 with sparsity"),
    "NVIDIA B200": (2250, "NVIDIA HGX B200 data sheet: 36,000 of 8 GPUs with sparsity"),
    "NVIDIA A10": (125, "NVIDIA A10 data sheet"),
    "NVIDIA L4": (121, "NVIDIA L4 data sheet: 242 with sparsity"),
    "NVIDIA L40S": (362, "NVIDIA L40S data sheet"),
    "NVIDIA GeForce RTX 3090": (71, "NVIDIA Ampere GA102 whitepaper, appendix A"),
    "NVIDIA GeForce RTX 4090": (165.2, "NVIDIA Ada GPU architecture whitepaper, appendix A"),
    "NVIDIA GeForce RTX 5090": (209.5, "NVIDIA RTX Blackwell architecture whitepaper, appendix A"),
    "TPU v4": (275, "Google Cloud documentation, TPU v4"),
    "TPU v5 lite": (197, "Google Cloud documentation, TPU v5e"),
    "TPU v5e": (197, "Google Cloud documentation, TPU v5e"),
    "TPU v5": (459, "Google Cloud documentation, TPU v5p"),
    "TPU v5p": (459, "Google Cloud documentation, TPU v5p"),
    "TPU v6 lite": (918, "Google Cloud documentation, TPU v6e"),
    "TPU v6e": (918, "Google Cloud documentation, TPU v6e"),
    # A chip has two cores, and each of them is a device of its own.
    "TPU7x": (2307 / 2, "Google Cloud documentation, TPU7x (Ironwood)"),
}

# As in "NVIDIA A100-SXM4-40GB" and "NVIDIA H100 80GB HBM3". A word that is not here, as "Laptop" or
# "Ti", names another chip, whose MFU is unknown rather than wrong.
_FORM = r"([ -](SXM\d?|PCIE?|\d+GB|HBM\d\w?))*"


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 FLOP/s of a device; None for a CPU and for a chip that is not in the table."""
    return peak_of_kind(device.device_kind)


def peak_of_kind(device_kind: str) -> float | None:
    """`peak_flops` of the devices of that name."""
    for name in sorted(PEAK_TFLOPS, key=len, reverse=True):  # the PCIe card has a row of its own
        if re.fullmatch(re.escape(name) + _FORM, device_kind, re.IGNORECASE):
            return PEAK_TFLOPS[name][0] * 1e12
    return None
