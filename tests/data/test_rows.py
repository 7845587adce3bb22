"""The row rule, and shuffles that are a pure function of seed, source and epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import EOD, random_documents, slow_rows, write_source

from stablelm_jax.data import rows as rows_module
from stablelm_jax.data.rows import SourceRows, epoch_order, row_order, source_seed, token_stream
from stablelm_jax.data.shards import ShardError


def random_source(root, name="books", shards=3, documents=12, longest=15, seed=0):
    rng = np.random.default_rng(seed)
    train = [random_documents(rng, documents, longest) for _ in range(shards)]
    return write_source(root, name, train), train


@settings(max_examples=60)
@given(
    shard_sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    longest=st.sampled_from([1, 3, 20]),
    sequence_length=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_rows_are_cut_from_all_shards_as_one_stream(
    tmp_path_factory, shard_sizes, longest, sequence_length, seed
):
    """Shards shorter than a row among them; one token shared; the tail dropped."""
    rng = np.random.default_rng(seed)
    train = [random_documents(rng, size, longest) for size in shard_sizes]
    train[0] += [[9] * sequence_length + [EOD]]  # one row at least
    source = write_source(tmp_path_factory.mktemp("rows"), "books", train)
    rows = SourceRows(source, sequence_length, seed, source_id=3)
    expected = slow_rows(train, sequence_length)
    assert [rows.tokens(r).tolist() for r in range(len(rows))] == expected
    assert rows.tokens(0).dtype == np.int32 and rows.source_id == 3
    for one, other in zip(expected, expected[1:], strict=False):
        assert one[-1] == other[0]


def test_an_empty_shard_between_others_changes_nothing(tmp_path):
    source = write_source(tmp_path, "books", [[[8, 9, EOD]], [], [[10, EOD]], []])
    rows = SourceRows(source, 2, seed=0)
    assert [rows.tokens(r).tolist() for r in range(len(rows))] == [[8, 9, EOD], [EOD, 10, EOD]]


def test_a_source_of_exactly_one_row_will_do_and_one_token_less_will_not(tmp_path):
    document = [8] * 9 + [EOD]
    source = write_source(tmp_path, "books", [[document]])
    assert len(SourceRows(source, 9, seed=0)) == 1
    with pytest.raises(ValueError, match=r"10 train tokens.*row of 10 \+ 1.*shorter") as caught:
        SourceRows(source, 10, seed=0)
    assert str(source.directory) in str(caught.value)


def test_a_shard_of_other_size_than_the_manifest_says_is_refused_and_named(tmp_path):
    source, _ = random_source(tmp_path / "one")
    other, _ = random_source(tmp_path / "two", documents=40)
    (other.directory / "train-00001.bin").replace(source.directory / "train-00001.bin")
    (other.directory / "train-00001.idx").replace(source.directory / "train-00001.idx")
    with pytest.raises(ShardError, match="where the manifest says") as caught:
        token_stream(source, "train")
    assert str(source.directory / "train-00001.bin") in str(caught.value)


def order_of(dataset, start, count):
    """Which rows come, told apart by their tokens."""
    drawn = map(dataset.order, range(start, start + count))
    return [tuple(dataset.tokens(row).tolist()) for row in drawn]


@pytest.mark.parametrize("largest_table", [0, 10**6], ids=["grain", "table"])
def test_every_epoch_holds_every_row_once_in_an_order_of_its_own(
    tmp_path, monkeypatch, largest_table
):
    monkeypatch.setattr(rows_module, "MAX_TABLE", largest_table)
    source, train = random_source(tmp_path, documents=60)
    expected = sorted(map(tuple, slow_rows(train, 10)))
    dataset = SourceRows(source, 10, seed=5)
    epochs = [order_of(dataset, epoch * len(dataset), len(dataset)) for epoch in range(4)]
    assert len(expected) == len(dataset) > 100
    for epoch in epochs:
        assert sorted(epoch) == expected
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [tuple(row) for row in slow_rows(train, 10)] not in epochs


@pytest.mark.parametrize("largest_table", [0, 10**6], ids=["grain", "table"])
def test_a_row_does_not_depend_on_what_was_read_before(tmp_path, monkeypatch, largest_table):
    monkeypatch.setattr(rows_module, "MAX_TABLE", largest_table)
    source, _ = random_source(tmp_path, documents=60)
    in_order = SourceRows(source, 10, seed=5)
    total = 5 * len(in_order)
    expected = order_of(in_order, 0, total)
    at_random = SourceRows(source, 10, seed=5)
    for n in np.random.default_rng(0).permutation(total).tolist():
        assert order_of(at_random, n, 1) == [expected[n]]


@pytest.mark.parametrize("largest_table", [0, 10**6], ids=["grain", "table"])
def test_sources_and_seeds_shuffle_apart(tmp_path, monkeypatch, largest_table):
    monkeypatch.setattr(rows_module, "MAX_TABLE", largest_table)
    books, _ = random_source(tmp_path, "books", documents=60)
    poems, _ = random_source(tmp_path, "poems", documents=60)  # the same text
    orders = set()
    for source in (books, poems):
        for seed in (0, 1, 2):
            dataset = SourceRows(source, 10, seed)
            for epoch in (0, 1, 2):
                orders.add(tuple(order_of(dataset, epoch * len(dataset), len(dataset))))
    assert len(orders) == 18


def test_both_shuffles_stand_on_either_side_of_the_table_limit():
    for rows, is_table in ((rows_module.MAX_TABLE, True), (rows_module.MAX_TABLE + 1, False)):
        order, table = row_order(rows, 3), epoch_order(rows, 3, 0)
        assert ([order(n) for n in range(9)] == table[:9].tolist()) is is_table


def test_the_order_of_an_epoch_is_even(tmp_path):
    """Each row is equally likely at each place: 8 rows over 4,000 epochs, chi-squared."""
    counts = np.zeros((8, 8))
    for epoch in range(4000):
        counts[np.arange(8), epoch_order(8, 1, epoch)] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 100  # 49 degrees of freedom: p = 2e-5


def test_orders_are_what_they_were_in_the_first_release(tmp_path):
    """A change here changes the data order of every run that is under way."""
    assert source_seed(1234, "books") == 810270850
    assert epoch_order(10, 3, 0).tolist() == [6, 1, 8, 5, 2, 7, 9, 4, 3, 0]
    assert epoch_order(10, 3, 1).tolist() == [9, 7, 8, 3, 5, 6, 4, 0, 2, 1]
    source = write_source(tmp_path, "books", [[list(range(70_000))]])
    dataset = SourceRows(source, 1, seed=1234)
    numbers = (0, 1, 2, 3, 69_998, 69_999, 70_000, 70_001)
    rows = [dataset.tokens(dataset.order(n))[0].item() for n in numbers]
    assert rows == [30443, 57464, 22906, 18970, 1812, 35685, 55066, 16257]
