"""The peak that MFU is measured by, for names as jax gives them."""

import pytest

from stablelm_jax.parallel.chips import PEAKS, peak_flops


@pytest.mark.parametrize(
    "kind, tflops",
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
    ],
)
def test_a_device_has_the_dense_bfloat16_rate_of_its_data_sheet(kind, tflops):
    assert peak_flops(kind) == tflops * 1e12


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "Tesla T4",
        "NVIDIA A10G",  # another chip than the A10
        "NVIDIA L40",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "TPU v5x",
    ],
)
def test_what_is_not_in_the_table_has_no_peak_rather_than_that_of_a_chip_with_a_similar_name(kind):
    assert peak_flops(kind) is None


def test_every_peak_names_its_source():
    assert all(peak["tflops"] > 0 and peak["source"] for peak in PEAKS.values())
