"""Intervals hold what they should as often as they say, whatever the differences depend on."""

import numpy as np
import pytest

from stablelm_jax.reporting.paired import block_length, of_documents, of_steps


def autoregressive(rng, steps, coefficient):
    noise = rng.normal(size=steps + 100)
    for step in range(1, len(noise)):
        noise[step] += coefficient * noise[step - 1]
    return noise[100:]


def share_covered(intervals, truth):
    return 100 * np.mean([found.low <= truth <= found.high for found in intervals])


@pytest.mark.parametrize("steps, coefficient", [(400, 0.0), (400, 0.6), (1000, 0.9)])
def test_the_interval_of_equal_runs_holds_0_in_95_of_100_seeds(steps, coefficient):
    tokens = np.full(steps, 2048.0)
    found = []
    for seed in range(300):
        noise = autoregressive(np.random.default_rng(seed), steps, coefficient)
        found.append(of_steps(1e-3 * noise * tokens, tokens)[0])
    covered = share_covered(found, 0.0)
    print(f"seeds 0 to 299, coefficient {coefficient}: {covered:.0f} of 100")
    assert 92 <= covered <= 98  # three standard errors of 300 seeds about 95 are 3.8
    too_narrow = [of_documents([np.stack([1e-3 * noise * tokens, tokens])])]
    assert coefficient < 0.5 or found[-1].high - found[-1].low > 1.5 * (
        too_narrow[0].high - too_narrow[0].low
    )


def test_blocks_grow_with_the_autocorrelation_and_leave_eight():
    rng = np.random.default_rng(5)
    lengths = [block_length(autoregressive(rng, 2000, r)) for r in (0.0, 0.5, 0.9, 0.999)]
    assert lengths[0] <= 4 and lengths == sorted(lengths) and lengths[-1] == 2000 // 8


def test_a_slow_drift_below_the_noise_makes_long_blocks():
    """Neighbours hardly correlate, and yet the steps are not independent."""
    rng = np.random.default_rng(6)
    drift = 0.3 * autoregressive(rng, 2000, 0.98)
    assert block_length(rng.normal(size=2000) + drift) > 50 * block_length(rng.normal(size=2000))


def test_the_interval_over_documents_holds_the_truth_in_95_of_100_samples():
    """Of two sources of unlike loss and length: each is sampled by itself."""
    found = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        parts = []
        for mean, documents in ((0.02, 30), (-0.01, 12)):
            tokens = rng.integers(20, 900, documents).astype(float)
            scores = mean + 0.05 * rng.normal(size=documents)
            parts.append(np.stack([scores * tokens, tokens]))
        interval = of_documents(parts)
        weights = [part[1].sum() for part in parts]
        truth = np.average((0.02, -0.01), weights=weights)
        found.append(interval.low <= truth <= interval.high)
    print(f"seeds 0 to 299: {100 * np.mean(found):.0f} of 100")
    assert 91 <= 100 * np.mean(found) <= 99


def test_no_difference_at_all_has_an_interval_of_no_width():
    parts = [np.stack([np.zeros(5), np.arange(1.0, 6.0)])]
    found = of_documents(parts)
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0) and found.is_zero_within


def test_a_source_of_one_document_is_joined_to_another_and_one_alone_has_no_interval():
    rng = np.random.default_rng(7)
    many = np.stack([rng.normal(size=20), rng.uniform(5, 9, size=20)])
    one = np.array([[1.0, 0.0], [7.0, 0.0]])  # and one without a counted token
    assert of_documents([one]).low is None and of_documents([one]).is_zero_within is None
    joined, whole = of_documents([many, one]), of_documents([np.concatenate([many, one], axis=1)])
    ends = [[found.low, found.mean, found.high] for found in (joined, whole)]
    assert ends[0] == pytest.approx(ends[1]) and ends[0] == sorted(set(ends[0]))
