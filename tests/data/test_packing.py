"""Best fit: the rule spelt out one item at a time gives the same rows."""

import numpy as np
import pytest
from seeds import new_rng

from stablelm_jax.data.packing import best_fit


def slow_best_fit(lengths, capacity):
    """The rooms left in the rows, by the textbook."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, room in enumerate(rooms) if room >= length]
        if not fitting:
            rooms.append(capacity)
            fitting = [len(rooms) - 1]
        rooms[min(fitting, key=lambda row: rooms[row])] -= length
    return sorted(rooms)


def first_fit(lengths, capacity):
    """How many rows it takes when each item, as they come, goes into the first with room."""
    rooms = []
    for length in lengths:
        row = next((row for row, room in enumerate(rooms) if room >= length), len(rooms))
        rooms += [capacity] * (row == len(rooms))
        rooms[row] -= length
    return len(rooms)


def rows_of(packing):
    items, starts = packing
    return [items[first:last].tolist() for first, last in zip(starts, starts[1:])]


def test_rows_are_those_of_the_textbook_and_hold_each_item_once():
    rng = new_rng()
    for _ in range(100):
        capacity = int(rng.integers(1, 60))
        lengths = rng.integers(1, capacity + 1, rng.integers(0, 80))
        rows = rows_of(best_fit(lengths, capacity, int(rng.integers(2**63))))
        assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
        rooms = sorted(capacity - int(lengths[row].sum()) for row in rows)
        assert rooms == slow_best_fit(lengths.tolist(), capacity)  # so none is negative


def test_there_are_never_more_rows_than_first_fit_gives():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        lengths = np.clip(rng.lognormal(3, 1, 300), 1, 100).astype(int)
        rows = len(best_fit(lengths, 100, seed)[1]) - 1
        assert -(-lengths.sum() // 100) <= rows <= first_fit(lengths.tolist(), 100)


def test_a_seed_gives_one_packing_and_another_seed_another():
    lengths = np.random.default_rng(0).integers(1, 20, 500)
    packings = [rows_of(best_fit(lengths, 32, seed)) for seed in (5, 5, 6, 2**64 - 1)]
    assert packings[0] == packings[1]
    assert len({str(packing) for packing in packings}) == 3
    together = [{tuple(row) for row in packing} for packing in packings]
    assert together[0] != together[2]  # not the order of the rows alone


def test_the_first_rows_are_a_fair_sample_of_the_lengths():
    lengths = np.tile(np.arange(1, 101), 100)
    rows = rows_of(best_fit(lengths, 100, 3))
    longest = [lengths[row].max() for row in rows]
    assert np.mean(longest[: len(rows) // 4]) == pytest.approx(np.mean(longest), rel=0.05)


def test_packings_are_what_they_were_in_the_first_release():
    """A change here changes the data order of every run that is under way."""
    items, starts = best_fit(np.array([3, 9, 2, 5, 5, 1, 10, 4, 5, 2]), 10, 1234)
    assert items.tolist() == [0, 2, 9, 3, 8, 4, 5, 7, 1, 6]
    assert starts.tolist() == [0, 3, 5, 8, 9, 10]
