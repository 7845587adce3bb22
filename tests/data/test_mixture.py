"""The mixture rule: weights as whole rows, nobody a whole row off, every row located at once."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import mixture_of, slow_mixture, slow_selection

from stablelm_jax.data.mixture import MAX_PERIOD, quantise

# The 28 reported weights of Stable LM 2's data table; they add up to 1.0001.
PUBLISHED = [
    0.0079, 0.0120, 0.0318, 0.0013, 0.0045, 0.0091, 0.0018, 0.2521, 0.0155, 0.0152,
    0.0097, 0.0096, 0.0097, 0.0100, 0.0855, 0.0130, 0.3292, 0.0231, 0.0019, 0.0023,
    0.0088, 0.0063, 0.0066, 0.0011, 0.0132, 0.0363, 0.0724, 0.0102,
]  # fmt: skip
WEIGHTS = {f"source_{number:02d}": weight for number, weight in enumerate(PUBLISHED)}
# The same, but with nothing exact about it: these need the longest period.
UNEVEN = {name: weight * math.pi for name, weight in WEIGHTS.items()}
BILLION = 10**9

SHARES = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=2), st.integers(1, 60), min_size=1, max_size=9
)


def largest_deviation(mixture):
    """The furthest any source is from its weight, in rows, just before and after it is dealt.

    Between two of its own rows a source only falls behind, so these moments hold its extremes.
    """
    stage = mixture.stages[0]
    row, share = np.arange(stage.period), stage.counts[stage.table] / stage.period
    behind = np.abs(stage.rank - share * row).max()
    ahead = np.abs(stage.rank + 1 - share * (row + 1)).max()
    return max(behind, ahead)


def test_decimal_weights_are_kept_exactly():
    assert quantise({"a": 0.7, "b": 0.3}) == {"a": 7, "b": 3}
    assert quantise({"b": 3, "a": 1}) == {"a": 1, "b": 3}
    assert quantise({"a": 50.0}) == {"a": 1}
    assert list(quantise(WEIGHTS).values()) == [round(weight * 10_000) for weight in PUBLISHED]


def test_weights_that_fit_no_short_period_are_rounded_to_65536_rows():
    counts = quantise(UNEVEN)
    assert sum(counts.values()) == MAX_PERIOD
    total = sum(UNEVEN.values())
    for name, weight in UNEVEN.items():
        assert abs(counts[name] - weight / total * MAX_PERIOD) < 1


@settings(max_examples=100)
@given(weights=st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=40))
def test_every_positive_weight_gets_a_row_and_the_period_is_bounded(weights):
    names = {f"s{number}": weight for number, weight in enumerate(weights)}
    counts = quantise(names)
    assert min(counts.values()) >= 1 and sum(counts.values()) <= MAX_PERIOD
    total = sum(Fraction(str(weight)) for weight in weights)
    lifted = sum(weight / float(total) * MAX_PERIOD < 1 for weight in weights)
    for name, weight in names.items():
        exact = float(weight / total * sum(counts.values()))
        assert abs(counts[name] - exact) < 1 + lifted


def test_tiny_weights_take_their_one_row_from_the_largest():
    weights = {f"tiny_{number}": 1e-12 for number in range(100)} | {"large": 1.0}
    assert quantise(weights) == {**dict.fromkeys(weights, 1), "large": MAX_PERIOD - 100}


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf, -math.inf])
def test_a_weight_that_is_no_share_is_refused_and_the_source_named(weight):
    with pytest.raises(ValueError, match="weight of 'web'"):
        mixture_of({"web": weight, "code": 1.0})


@pytest.mark.parametrize("weights", [{}, {"web": 0.0}, {"web": 0, "code": 0}])
def test_weights_without_a_positive_one_are_refused(weights):
    with pytest.raises(ValueError, match="none is positive"):
        mixture_of(weights)


def test_a_source_of_weight_zero_is_no_source():
    mixture = mixture_of({"a": 1, "b": 0, "c": 1})
    assert mixture.sources == ("a", "c")


def test_the_table_is_tijdemans_rule_worked_out_in_fractions():
    many = {name: 1 + round(weight * 500) for name, weight in WEIGHTS.items()}
    for counts in ({"a": 7, "b": 3}, {"a": 1, "b": 1, "c": 1, "d": 2}, many):
        mixture = mixture_of(counts)
        rows = 2 * sum(counts.values())
        names = [mixture.sources[mixture.locate(row)[0]] for row in range(rows)]
        assert names == slow_selection(counts, rows)


@settings(max_examples=60)
@given(counts=SHARES)
def test_no_source_is_ever_a_whole_row_off_its_weight(counts):
    mixture = mixture_of(counts)
    bound = 1 - 1 / (2 * len(counts) - 2) if len(counts) > 1 else 0
    assert largest_deviation(mixture) <= bound + 1e-9


@pytest.mark.parametrize("weights", [WEIGHTS, UNEVEN], ids=["exact", "rounded"])
def test_28_weights_are_kept_within_one_row_at_every_row_of_the_first_billion(weights):
    """Over one period by looking at every row, beyond by its repetition, looked at in samples."""
    mixture = mixture_of(weights)
    stage = mixture.stages[0]
    assert largest_deviation(mixture) <= 1 - 1 / 54 + 1e-9
    rows = np.random.default_rng(0).integers(0, BILLION, 20_000).tolist()
    for row in [*rows, 0, BILLION - 1]:
        periods, rest = divmod(row, stage.period)
        source, index = mixture.locate(rest)
        assert mixture.locate(row) == (source, index + periods * stage.counts[source])
    for row in (1, 54_321, BILLION):
        assert np.abs(mixture.rows_before(row) - row * stage.counts / stage.period).max() < 1


@settings(max_examples=60)
@given(
    spans=st.lists(st.tuples(st.integers(1, 60), SHARES), min_size=1, max_size=4),
    tail=st.integers(0, 80),
)
def test_rows_are_located_as_if_dealt_one_by_one_over_all_stages(spans, tail):
    """No row is skipped or given twice where the weights change: each source just goes on."""
    first_rows = np.cumsum([0] + [length for length, _ in spans[:-1]]).tolist()
    stages = [(row, counts) for row, (_, counts) in zip(first_rows, spans, strict=True)]
    mixture = mixture_of(stages[0][1], stages[1:])
    rows = first_rows[-1] + tail
    in_lowest_terms = [(row, quantise(counts)) for row, counts in stages]
    expected = slow_mixture(in_lowest_terms, rows)
    located = [mixture.locate(row) for row in range(rows)]
    assert [(mixture.sources[source], index) for source, index in located] == expected
    for row in (0, rows // 2, rows):
        names = [name for name, _ in expected[:row]]
        assert mixture.rows_before(row).tolist() == [names.count(n) for n in mixture.sources]


@pytest.mark.parametrize("first_rows", [[0], [-5], [10, 10], [10, 5]])
def test_stages_out_of_order_are_refused(first_rows):
    with pytest.raises(ValueError, match="rising order"):
        mixture_of({"a": 1}, [(row, {"a": 1}) for row in first_rows])


def test_a_later_stage_is_held_to_the_same_rules():
    with pytest.raises(ValueError, match="none is positive"):
        mixture_of({"a": 1}, [(10, {"a": 0})])


def test_a_negative_row_is_refused():
    mixture = mixture_of({"a": 1, "b": 1})
    for call in (mixture.locate, mixture.rows_before):
        with pytest.raises(ValueError, match="counted from 0"):
            call(-1)


def test_rows_far_beyond_any_run_are_located_without_overflow():
    mixture = mixture_of(UNEVEN)
    row = 2**55 + 12_345
    source, index = mixture.locate(row)
    share = mixture.stages[0].counts[source] / mixture.stages[0].period
    assert index == pytest.approx(row * share, rel=1e-12)
