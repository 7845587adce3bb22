import pytest

from stablelm_jax.planning.cost import cost_of


def test_the_published_run_comes_out_at_its_published_cost():
    """540,000 steps on A100s at 54.5 % with 12.28 GFLOP a token: about 92,000 hours, 30 MWh."""
    cost = cost_of(
        tokens=540_000 * 2048 * 4096,
        flops_per_token=12.28e9,
        devices=512,
        peak_tflops=312,
        mfu=0.545,
        watts=296,
    )
    assert cost.device_hours == pytest.approx(92_000, rel=0.015)
    assert cost.megawatt_hours == pytest.approx(30, rel=0.02)
    assert cost.tonnes_co2 == pytest.approx(11.5, rel=0.02)
    assert cost.hours == pytest.approx(cost.device_hours / 512)


def test_without_a_power_there_is_no_energy():
    cost = cost_of(tokens=1e9, flops_per_token=1e9, devices=1, peak_tflops=1, mfu=1.0, watts=None)
    assert (cost.tokens_per_second, cost.megawatt_hours, cost.tonnes_co2) == (1000.0, None, None)
