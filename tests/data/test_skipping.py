"""Rows and documents that are left out: they alone change, and they are counted."""

import contextlib

import numpy as np
import pytest
from prepared import EOD, mixture_of, random_documents, write_source

from stablelm_jax.data.batches import BatchSpec, train_batches
from stablelm_jax.data.packing import PackedSources
from stablelm_jax.data.rows import epoch_order, source_seed
from stablelm_jax.data.skipping import open_skip, parse_skip

LENGTH, ROWS, SEED = 16, 4, 5


def half_trained(document):
    return [(len(document) // 2, len(document))]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("skipped"), np.random.default_rng(1)
    kinds = {"pairs": ("pairs", half_trained), "poems": ("text", None), "prose": ("text", None)}
    found = {}
    for name, (kind, spans) in kinds.items():
        shards = [random_documents(rng, 20, 7 if spans else 30) for _ in range(2)]
        found[name] = write_source(root, name, shards, shards[0][:2], kind=kind, spans=spans)
    return found


def batches(sources, weights, packing, entries, count=24):
    """The batches of so many steps, as they are and with `entries` left out; what leaves them."""
    spec = BatchSpec(LENGTH, ROWS, SEED, EOD, packing=packing)
    chosen, mixture = {name: sources[name] for name in weights}, mixture_of(weights)
    packed = None if packing == "concatenate" else PackedSources(chosen, spec)
    left_out = open_skip(entries, chosen, LENGTH, SEED, packed)
    found = []
    for skips in ({}, left_out):
        made = train_batches(chosen, mixture, spec, packed=packed, left_out=skips)
        with contextlib.closing(made):
            found.append([next(made) for _ in range(count)])
    return *found, left_out, mixture, packed


def rows_of(batches, name):
    return np.concatenate([batch[name] for batch in batches])


def test_rows_that_are_left_out_keep_their_place_and_count_for_nothing(sources):
    entries = ("prose:rows:3-5", "prose:row:9")
    whole, left, left_out, mixture, _ = batches(
        sources, {"poems": 1, "prose": 3}, "concatenate", entries
    )
    for name in whole[0].keys() - {"loss_mask"}:
        np.testing.assert_array_equal(rows_of(whole, name), rows_of(left, name))
    is_prose = rows_of(whole, "source_ids") == 1
    count = (sources["prose"].manifest.train.tokens - 1) // LENGTH
    epochs = [epoch_order(count, source_seed(SEED, "prose"), epoch) for epoch in range(3)]
    numbers = np.concatenate(epochs)[: is_prose.sum()]
    assert is_prose.sum() > count  # some rows came twice
    expected = rows_of(whole, "loss_mask").copy()
    expected[np.flatnonzero(is_prose)[np.isin(numbers, [3, 4, 5, 9])]] = 0
    np.testing.assert_array_equal(rows_of(left, "loss_mask"), expected)
    drawn = range(*(int(mixture.rows_before(row)[1]) for row in (0, 24 * ROWS)))
    assert left_out["prose"].tokens(drawn) == (expected == 0).sum()


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_no_token_of_a_document_that_is_left_out_is_an_input_or_a_target(sources, packing):
    documents = (4, 5, 23)
    whole, left, left_out, _, packed = batches(
        sources, {"prose": 1}, packing, ("prose:documents:4-5", "prose:document:23")
    )
    stream = packed["prose", "train"].stream if packed else left_out["prose"]._rows.stream
    offsets, marked = stream.document_offsets(), np.zeros(stream.num_tokens, bool)
    for number in documents:
        marked[offsets[number] : offsets[number + 1]] = True
    rows = left_out["prose"]._rows
    for number in range(len(rows)):
        expected, place = np.zeros(LENGTH, bool), 0
        for first, count in rows.extents(number):
            tokens = marked[first : first + count + 1]
            expected[place : place + count] = tokens[:-1] | tokens[1:]
            place += count
        found = left_out["prose"].places(number)
        assert (found is None) == (not expected.any())
        assert found is None or found.tolist() == expected.tolist()
    for name in whole[0].keys() - {"loss_mask"}:
        np.testing.assert_array_equal(rows_of(whole, name), rows_of(left, name))
    assert rows_of(left, "loss_mask").sum() < rows_of(whole, "loss_mask").sum()


def test_a_pair_whose_document_is_left_out_is_no_pair_and_its_neighbours_stay(sources):
    whole, left, *_ = batches(sources, {"pairs": 1}, "best_fit", ("pairs:documents:6-7",))
    before, after = rows_of(whole, "pair_ids"), rows_of(left, "pair_ids")
    assert (before == 3).any()
    np.testing.assert_array_equal(after, np.where(before == 3, -1, before))


def test_what_cannot_be_left_out_is_refused_by_name(sources):
    for entry in ("prose", "prose:rows:", "prose:rows:5-4", "prose:tokens:1", 7):
        with pytest.raises(ValueError, match="names no rows or documents; write 'SOURCE:rows"):
            parse_skip([entry])
    for entry, message in (
        ("news:rows:1", "'news' is no source of the run, which has prose"),
        ("prose:rows:999", "prose: there is no row 999: it has"),
        ("prose:documents:2-40", "prose: there is no document 40: it has 40 documents"),
    ):
        with pytest.raises(ValueError, match=message):
            open_skip([entry], {"prose": sources["prose"]}, LENGTH, SEED, None)
