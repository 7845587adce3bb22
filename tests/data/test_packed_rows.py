"""Packed rows: the rules spelt out slowly give the same arrays, on any hosts, from any row."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import EOD, mixture_of, random_documents, slow_mixture, write_source

from stablelm_jax.data import rows as rows_module
from stablelm_jax.data.batches import BatchSpec, packed_batches, train_batches
from stablelm_jax.data.manifest import data_hash
from stablelm_jax.data.packing import PackedSources
from stablelm_jax.data.rows import epoch_order, row_order, source_seed
from stablelm_jax.data.shards import ShardError, spans_path

LENGTH, SEED = 24, 77
STAGES = [(0, {"chats": 5, "poems": 2}), (19, {"chats": 1, "poems": 3})]
SPEC = BatchSpec(LENGTH, 4, SEED, EOD, packing="best_fit")
KINDS = {"chats": "conversations", "poems": "text"}


def spans_of(document):
    """Two answers in a long one, one in a short one; the first may begin with the document."""
    n = len(document)
    return [(n % 3, n // 2), (n - n // 4, n)] if n > 9 else [(n // 2, n)]


def random_turns(rng, count, longest):
    """Conversations with our end of a document in their middle, as zephyr's turns end."""
    documents = random_documents(rng, count, longest)
    return [[EOD if place % 5 == 4 else t for place, t in enumerate(d)] for d in documents]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A source of conversations and one of text, with documents longer than a row; documents."""
    root, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    chats = [[d + [EOD] for d in random_turns(rng, 40, 20)] for _ in range(2)]
    train = {"chats": chats, "poems": [random_documents(rng, 25, 70), random_documents(rng, 9, 5)]}
    held_out = {"chats": random_turns(rng, 30, 25), "poems": random_documents(rng, 20, 60)}
    sources = {
        name: write_source(root, name, train[name], held_out[name], kind=kind, spans=spans)
        for (name, kind), spans in zip(KINDS.items(), (spans_of, None))
    }
    documents = {(name, "train"): list(itertools.chain(*train[name])) for name in KINDS}
    return sources, documents | {(name, "held_out"): held_out[name] for name in KINDS}


@pytest.fixture(scope="module")
def packed(corpus):
    return PackedSources(corpus[0], SPEC)


def slow_items(documents, kind, loss_on="answers"):
    """The segments of each item as (tokens, trained places of the document)."""
    items = []
    for document in documents:
        trained = set(range(len(document)))
        if kind != "text" and loss_on == "answers":
            trained = {i for first, last in spans_of(document) for i in range(first, last)}
        if kind != "text":
            items.append([(document, trained)])
            continue
        for first in range(0, len(document) - 1, LENGTH):
            piece = document[first : first + LENGTH + 1]
            items.append([(piece, set(range(len(piece))))])
    if kind == "pairs":
        items = [[*chosen, *rejected] for chosen, rejected in zip(items[::2], items[1::2])]
    return items


def slow_row(items):
    """A row of items one token at a time: tokens, targets, segment ids, positions, loss mask."""
    row, number = [], 0
    for tokens, trained in itertools.chain(*items):
        number += 1
        for place in range(len(tokens) - 1):
            counts = 1.0 if place + 1 in trained else 0.0
            row.append((tokens[place], tokens[place + 1], number, place, counts))
    row += [(EOD, EOD, number + 1, place, 0.0) for place in range(LENGTH - len(row))]
    assert len(row) == LENGTH
    return [list(column) for column in zip(*row)]


def check_row(batch, place, expected):
    names = ("tokens", "targets", "segment_ids", "positions", "loss_mask")
    for name, values in zip(names, slow_row(expected)):
        assert batch[name][place].tolist() == values, name


@settings(max_examples=30)
@given(
    start_row=st.integers(0, 60),
    hosts=st.sampled_from([1, 2, 4]),
    rows_each=st.integers(1, 4),
    prefetch=st.integers(0, 2),
    given_packed=st.booleans(),
)
def test_batches_equal_the_rules_spelt_out_on_any_hosts_from_any_row(
    corpus, packed, start_row, hosts, rows_each, prefetch, given_packed
):
    sources, documents = corpus
    spec, steps = dataclasses.replace(SPEC, batch_size=hosts * rows_each), 3
    ready = packed if given_packed else None
    batches = []
    for host in range(hosts):
        iterator = train_batches(
            sources,
            mixture_of(STAGES[0][1], STAGES[1:]),
            spec,
            start_row=start_row,
            share=(host, hosts),
            prefetch=prefetch,
            packed=ready,
        )
        batches.append(list(itertools.islice(iterator, steps)))
        iterator.close()
    rows = slow_mixture(STAGES, start_row + steps * spec.batch_size)[start_row:]
    for number, (name, index) in enumerate(rows):
        split = packed[name, "train"]
        epoch, place = divmod(index, len(split))
        row = epoch_order(len(split), source_seed(SEED, name), epoch)[place]
        items = slow_items(documents[name, "train"], KINDS[name])
        step, in_step = divmod(number, spec.batch_size)
        batch = batches[in_step // rows_each][step]
        check_row(batch, in_step % rows_each, [items[i] for i in split.items(row)])
        assert batch["source_ids"][in_step % rows_each] == sorted(KINDS).index(name)
        assert "pair_ids" not in batch


@pytest.mark.parametrize("largest_table", [0, 10**6], ids=["grain", "table"])
def test_each_epoch_holds_each_row_once_in_another_order(packed, monkeypatch, largest_table):
    monkeypatch.setattr(rows_module, "MAX_TABLE", largest_table)
    rows = packed["poems", "train"]
    order, count = row_order(len(rows), 5), len(rows)
    epochs = [[order(n) for n in range(e * count, (e + 1) * count)] for e in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


@pytest.mark.parametrize("packing", ["best_fit", "one"])
@pytest.mark.parametrize("hosts", [1, 2])
def test_each_row_comes_once_in_order_and_each_trained_token_is_scored_once(corpus, packing, hosts):
    sources, documents = corpus
    spec = dataclasses.replace(SPEC, packing=packing)
    packed = PackedSources(sources, spec)
    for (name, split), rows in packed.items():
        items = slow_items(documents[name, split], KINDS[name])
        parts = [
            list(packed_batches(packed, name, split, spec, share=(p, hosts))) for p in range(hosts)
        ]
        flat = [
            (batch, place)
            for step in zip(*parts, strict=True)
            for batch in step
            for place in range(4 // hosts)
        ]
        assert len(flat) == -(-len(rows) // 4) * 4
        for number, (batch, place) in enumerate(flat):
            inside = rows.items(number).tolist() if number < len(rows) else []
            check_row(batch, place, [items[i] for i in inside])
            if packing == "one" and inside:
                assert inside == [number]
        given = sorted(i for row in range(len(rows)) for i in rows.items(row).tolist())
        assert given == list(range(len(items)))
        trained = sum(len(t - {0}) for item in items for _, t in item)
        assert rows.trained == trained == sum(batch["loss_mask"][p].sum() for batch, p in flat)


def test_loss_on_all_counts_every_target_of_a_conversation(corpus):
    sources, documents = corpus
    spec = dataclasses.replace(SPEC, loss_on="all")
    packed = PackedSources(sources, spec)
    items = slow_items(documents["chats", "train"], "conversations", "all")
    rows = packed["chats", "train"]
    (batch, *_) = packed_batches(packed, "chats", "train", spec, max_rows=1)
    check_row(batch, 0, [items[i] for i in rows.items(0)])
    check_row(batch, 1, [])  # past max_rows
    assert rows.trained == rows.lengths.sum()


def test_both_sides_of_a_pair_lie_in_one_row_and_pair_ids_tell_which(tmp_path):
    rng = np.random.default_rng(2)
    shards = [random_turns(rng, 20, 11), random_turns(rng, 12, 11)]
    held_out = random_turns(rng, 8, 4)  # short: more pairs in a row than in training
    source = write_source(tmp_path, "pairs", shards, held_out, kind="pairs", spans=spans_of)
    packed = PackedSources({"pairs": source}, SPEC)
    for split, documents in (("train", sum(shards, [])), ("held_out", held_out)):
        pairs, seen = slow_items(documents, "pairs"), []
        rows = packed["pairs", split]
        for number, batch in enumerate(packed_batches(packed, "pairs", split, SPEC)):
            assert batch["pair_ids"].shape == (4, packed.most_pairs)
            for place, row in enumerate(range(4 * number, 4 * number + 4)):
                ids = batch["pair_ids"][place]
                inside = ids[ids >= 0].tolist()
                assert (ids[len(inside) :] == -1).all()
                check_row(batch, place, [pairs[i] for i in inside])
                assert row < len(rows) or not inside
                seen += inside
        assert sorted(seen) == list(range(len(documents) // 2))
    counts = [len(packed[k].items(row)) for k in packed for row in range(len(packed[k]))]
    assert packed.most_pairs == max(counts) > packed["pairs", "train"].most_pairs


def test_items_that_no_row_holds_are_counted_with_a_remedy(tmp_path):
    documents = [[8] * 24 + [EOD], [8] * 25 + [EOD], [8] * 30 + [EOD]]
    source = write_source(tmp_path, "chats", [documents], kind="conversations", spans=spans_of)
    with pytest.raises(ValueError, match="2 of 3 train conversations fit into no row of 24") as e:
        PackedSources({"chats": source}, SPEC)
    assert "the longest takes 30" in str(e.value) and "--max-tokens" in str(e.value)
    pairs = [[8] * 12 + [EOD], [8] * 13 + [EOD]]
    source = write_source(tmp_path, "pairs", [pairs], pairs, kind="pairs", spans=spans_of)
    with pytest.raises(ValueError, match="1 of 1 train pairs fit into no row of 24 tokens"):
        PackedSources({"pairs": source}, SPEC)


def test_a_sidecar_that_is_missing_or_altered_is_refused_and_named(tmp_path):
    documents = [[8] * 9 + [EOD]]
    source = write_source(tmp_path, "chats", [documents], kind="conversations", spans=spans_of)
    path = spans_path(source.directory / source.manifest.train.shards[0].file)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\1")
    with pytest.raises(ShardError, match=f"{path}: sha256 .* where the manifest says"):
        PackedSources({"chats": source}, SPEC)
    path.unlink()
    with pytest.raises(ShardError, match=f"{path}: missing"):
        PackedSources({"chats": source}, SPEC)


def test_other_spans_over_the_same_tokens_are_other_data(tmp_path):
    def whole(document):
        return [(0, len(document))]

    documents = [[8] * 9 + [EOD]]
    hashes = set()
    for number, spans in enumerate((spans_of, whole, spans_of)):
        folder = tmp_path / str(number)
        source = write_source(folder, "chats", [documents], kind="conversations", spans=spans)
        hashes.add(data_hash({"chats": source.manifest}))
    assert len(hashes) == 2
