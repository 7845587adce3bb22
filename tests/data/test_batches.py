"""Batches: the rules spelt out slowly give the same arrays, on any hosts, from any row."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import (
    EOD,
    mixture_of,
    random_documents,
    slow_marks,
    slow_mixture,
    slow_rows,
    write_source,
)

from stablelm_jax.data.batches import BatchSpec, collate, held_out_batches, train_batches
from stablelm_jax.data.rows import epoch_order, source_seed
from stablelm_jax.data.shards import ShardError

LENGTH, SEED = 12, 77
STAGES = [(0, {"code": 5, "poems": 2, "web": 9}), (37, {"code": 1, "web": 2})]
KEYS = ["tokens", "targets", "segment_ids", "positions", "loss_mask", "source_ids"]
SPEC = BatchSpec(LENGTH, 4, SEED, EOD)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three sources of different sizes, one of them a handful of rows, and their documents."""
    root, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    train = {
        "code": [random_documents(rng, 30, 30), random_documents(rng, 3, 4)],
        "poems": [random_documents(rng, 20, 5)],
        "web": [random_documents(rng, 25, 40) for _ in range(3)],
    }
    held_out = {name: random_documents(rng, 20, 25) for name in train}
    sources = {name: write_source(root, name, train[name], held_out[name]) for name in train}
    return sources, train, held_out


@pytest.fixture(scope="module")
def mixture():
    return mixture_of(STAGES[0][1], STAGES[1:])


@pytest.fixture(scope="module")
def slow(corpus):
    """Global rows 0 .. 399 as (source id, tokens), by the rules one row at a time."""
    _, train, _ = corpus
    rows = {name: slow_rows(shards, LENGTH) for name, shards in train.items()}
    expected = []
    for name, index in slow_mixture(STAGES, 400):
        epoch, place = divmod(index, len(rows[name]))
        order = epoch_order(len(rows[name]), source_seed(SEED, name), epoch)
        expected.append((sorted(train).index(name), rows[name][order[place]]))
    assert len(rows["poems"]) < 10  # so that several epochs are among them
    return expected


def expected_batch(rows):
    """The batch of slow rows, as nested lists."""
    marks = [slow_marks(tokens) for _, tokens in rows]
    return {
        "tokens": [tokens[:-1] for _, tokens in rows],
        "targets": [tokens[1:] for _, tokens in rows],
        "segment_ids": [segments for segments, _ in marks],
        "positions": [positions for _, positions in marks],
        "loss_mask": [[1.0] * LENGTH for _ in rows],
        "source_ids": [source for source, _ in rows],
    }


def as_lists(batch):
    return {key: value.tolist() for key, value in batch.items()}


def take(batches, count):
    with contextlib.closing(batches):
        return [next(batches) for _ in range(count)]


@settings(max_examples=60)
@given(
    start_row=st.integers(0, 300),
    hosts=st.sampled_from([1, 2, 4]),
    rows_each=st.integers(1, 5),
    prefetch=st.integers(0, 3),
    steps=st.integers(1, 4),
)
def test_batches_equal_the_rules_spelt_out_on_any_hosts_from_any_row(
    corpus, mixture, slow, start_row, hosts, rows_each, prefetch, steps
):
    spec = dataclasses.replace(SPEC, batch_size=hosts * rows_each)
    parts = [
        take(
            train_batches(
                corpus[0],
                mixture,
                spec,
                start_row=start_row,
                share=(host, hosts),
                prefetch=prefetch,
            ),
            steps,
        )
        for host in range(hosts)
    ]
    for step in range(steps):
        first = start_row + step * spec.batch_size
        expected = expected_batch(slow[first : first + spec.batch_size])
        whole = {key: np.concatenate([part[step][key] for part in parts]) for key in KEYS}
        assert as_lists(whole) == expected


def test_a_restart_on_half_the_hosts_continues_the_same_rows(corpus, mixture, slow):
    rows = []
    for start, hosts, steps in ((0, 4, 3), (24, 2, 2), (40, 1, 4)):
        spec = dataclasses.replace(SPEC, batch_size=8)
        parts = [
            take(
                train_batches(
                    corpus[0],
                    mixture,
                    spec,
                    start_row=start,
                    share=(host, hosts),
                ),
                steps,
            )
            for host in range(hosts)
        ]
        for step in range(steps):
            rows += [row for part in parts for row in part[step]["targets"].tolist()]
    assert rows == [tokens[1:] for _, tokens in slow[:72]]


def test_batches_of_several_sizes_are_the_next_rows_in_turn(corpus, mixture, slow):
    firsts, rows = [8, 16, 24, 48, 56], []
    parts = [
        take(train_batches(corpus[0], mixture, SPEC, first_row=firsts.__getitem__, share=(p, 4)), 4)
        for p in range(4)
    ]
    for number in range(4):
        assert {len(part[number]["tokens"]) for part in parts} == {2 if number != 2 else 6}
        rows += [row for part in parts for row in part[number]["targets"].tolist()]
    assert rows == [tokens[1:] for _, tokens in slow[8:56]]


@pytest.mark.parametrize("pieces", [2, 4])
def test_a_cut_row_is_as_many_rows_of_the_same_text_and_targets(corpus, mixture, slow, pieces):
    (made,) = take(train_batches(corpus[0], mixture, SPEC, pieces=lambda n: pieces), 1)
    starts, short = range(0, LENGTH, LENGTH // pieces), LENGTH // pieces
    rows = [(source, row[at : at + short + 1]) for source, row in slow[:4] for at in starts]
    expected = expected_batch(rows) | {"loss_mask": [[1.0] * short for _ in rows]}
    assert as_lists(made) == expected


def test_a_batch_has_the_types_and_shapes_of_the_contract(corpus, mixture):
    (batch,) = take(train_batches(corpus[0], mixture, SPEC), 1)
    assert list(batch) == KEYS
    for key, value in batch.items():
        assert value.dtype == (np.float32 if key == "loss_mask" else np.int32)
        assert value.shape == ((4,) if key == "source_ids" else (4, LENGTH))
        assert value.flags.c_contiguous and value.flags.writeable


def marks_of(row, loss_on_first_token=True):
    spec = BatchSpec(len(row) - 1, 1, 0, EOD, loss_on_first_token)
    batch = collate(np.array([row], np.int32), [0], spec)
    return [batch[key][0].tolist() for key in ("segment_ids", "positions", "loss_mask")]


def test_end_of_text_belongs_to_the_document_it_ends():
    segments, positions, mask = marks_of([8, 9, EOD, 10, 11, EOD, 12])
    assert segments == [1, 1, 1, 2, 2, 2]
    assert positions == [0, 1, 2, 0, 1, 2]
    assert mask == [1] * 6


def test_a_row_may_open_with_the_end_of_a_document_and_hold_documents_of_one_token():
    segments, positions, _ = marks_of([EOD, EOD, EOD, 8, EOD, 9, 10])
    assert segments == [1, 2, 3, 4, 4, 5]
    assert positions == [0, 0, 0, 0, 1, 0]


def test_loss_on_the_first_token_of_a_document_can_be_switched_off():
    _, _, mask = marks_of([8, EOD, 9, 10, EOD, 11], loss_on_first_token=False)
    assert mask == [1, 0, 1, 1, 0]  # targets EOD, 9, 10, EOD, 11: EOD itself still counts


@settings(max_examples=100)
@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 20),
    share=st.sampled_from([0, 0.1, 0.5, 1]),
    seed=st.integers(0, 999),
)
def test_marks_of_any_rows_equal_the_rule_one_token_at_a_time(rows, length, share, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(8, 64, (rows, length + 1), dtype=np.int32)
    tokens[rng.random(tokens.shape) < share] = EOD
    batch = collate(tokens, [0] * rows, BatchSpec(length, rows, 0, EOD))
    for row, segment_ids, positions in zip(
        tokens.tolist(), batch["segment_ids"].tolist(), batch["positions"].tolist(), strict=True
    ):
        assert (segment_ids, positions) == slow_marks(row)


@settings(max_examples=60)
@given(
    length=st.integers(1, 40),
    hosts=st.sampled_from([1, 2, 4]),
    rows_each=st.integers(1, 3),
    loss_on_first_token=st.booleans(),
)
def test_every_held_out_token_is_scored_once(corpus, length, hosts, rows_each, loss_on_first_token):
    sources, _, held_out = corpus
    spec = BatchSpec(length, hosts * rows_each, SEED, EOD, loss_on_first_token)
    stream = [token for document in held_out["poems"] for token in document]
    parts = [
        list(held_out_batches(sources, "poems", spec, max_rows=10**6, share=(host, hosts)))
        for host in range(hosts)
    ]
    assert len({len(part) for part in parts}) == 1
    pairs = []
    for step in range(len(parts[0])):
        for part in parts:
            batch = part[step]
            assert batch["tokens"].shape == (rows_each, length)
            assert batch["source_ids"].tolist() == [1] * rows_each
            chosen = batch["loss_mask"] == 1
            pairs += zip(batch["tokens"][chosen], batch["targets"][chosen], strict=True)
    expected = list(zip(stream, stream[1:], strict=False))
    if not loss_on_first_token:
        expected = [(before, target) for before, target in expected if before != EOD]
    assert pairs == expected


def test_held_out_rows_can_be_limited_and_mark_their_documents(corpus):
    sources, _, held_out = corpus
    stream = [token for document in held_out["web"] for token in document]
    batches = list(held_out_batches(sources, "web", SPEC, max_rows=6))
    assert len(batches) == 2 and batches[1]["loss_mask"][2:].sum() == 0
    tokens = np.concatenate([batch["tokens"] for batch in batches])[:6]
    assert tokens.ravel().tolist() == stream[: 6 * LENGTH]
    segments, positions = slow_marks(stream[: LENGTH + 1])
    assert batches[0]["segment_ids"][0].tolist() == segments
    assert batches[0]["positions"][0].tolist() == positions
    assert sum(batch["loss_mask"].sum() for batch in batches) == 6 * LENGTH


def test_a_held_out_split_of_one_token_is_refused(tmp_path):
    source = write_source(tmp_path, "web", [[[8] * 20]], held_out=[[EOD]])
    with pytest.raises(ValueError, match="1 held-out tokens, nothing to score"):
        next(held_out_batches({"web": source}, "web", SPEC, max_rows=10**6))


@pytest.mark.parametrize(
    ("changes", "hosts", "message"),
    [
        ({"batch_size": 6}, 4, "batch_size 6 over 4 processes"),
        ({"batch_size": 0}, 1, "batch_size 0"),
        ({"sequence_length": 1000}, 1, "do not fill one row"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(corpus, mixture, changes, hosts, message):
    spec = dataclasses.replace(SPEC, **changes)
    with pytest.raises(ValueError, match=message):
        train_batches(corpus[0], mixture, spec, share=(0, hosts))


def test_closing_leaves_no_thread_behind(corpus, mixture):
    before = threading.active_count()
    for number in range(20):
        batches = train_batches(corpus[0], mixture, SPEC, prefetch=3)
        for _ in range(number % 4):
            next(batches)
        batches.close()
        batches.close()
        assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_an_error_in_a_reader_surfaces_in_next_with_the_file_named(tmp_path, prefetch):
    rng = np.random.default_rng(0)
    source = write_source(tmp_path, "web", [random_documents(rng, 200, 20)])
    before = threading.active_count()
    batches = train_batches({"web": source}, mixture_of({"web": 1}), SPEC, prefetch=prefetch)
    next(batches)
    os.truncate(source.directory / "train-00000.bin", 40)
    with pytest.raises(ShardError, match="cut short") as caught:
        for _ in range(20):
            next(batches)
    assert str(source.directory / "train-00000.bin") in str(caught.value)
    with pytest.raises(StopIteration):  # the batch that failed is not skipped
        next(batches)
    assert threading.active_count() == before


def test_an_interrupt_while_waiting_for_a_batch_does_not_skip_it(corpus, mixture, monkeypatch):
    batches = train_batches(corpus[0], mixture, SPEC)
    next(batches)

    def interrupted(future, timeout=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("concurrent.futures.Future.result", interrupted)
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_the_first_batch_at_any_row_comes_at_once(corpus, mixture):
    """In constant time: the bound is loose, but counting 10**15 rows would take months."""
    began = time.perf_counter()
    for start_row in (0, 10**9, 10**15):
        take(train_batches(corpus[0], mixture, SPEC, start_row=start_row), 1)
    assert time.perf_counter() - began < 10
