"""Assembly: which documents are held out, and where shards are cut."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stablelm_jax.preparation import assemble
from stablelm_jax.preparation.assemble import SourceError
from stablelm_jax.preparation.parts import PartInfo, PartWriter, content_hash, parts_of_unit


class FakePart:
    """As much of a part as choosing and cutting looks at: one token a byte of text."""

    def __init__(self, texts):
        self.texts = texts
        sizes = [len(text) for text in texts]
        self.info = PartInfo(len(texts), 0, len(texts), sum(sizes), sum(sizes), 0, True)

    def hashes(self):
        return np.array([content_hash(text) for text in self.texts], np.uint64)

    def bytes(self):
        return np.array([len(text) for text in self.texts], np.int64)

    lengths = bytes


def texts_of(rng, count, longest=3000):
    return [rng.randbytes(rng.randint(1, longest)) for _ in range(count)]


def in_parts(rng, texts):
    cuts = sorted(rng.sample(range(len(texts) + 1), min(4, len(texts))))
    edges = [0, *cuts, len(texts)]
    return [FakePart(texts[i:j]) for i, j in zip(edges, edges[1:], strict=False)]


def held(parts, fraction=0.001):
    chosen = set(assemble.choose_held_out(parts, fraction).hashes.tolist())
    return [text for part in parts for text in part.texts if content_hash(text) in chosen]


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.05, 0.25])
def test_enough_text_is_held_out_and_hardly_more(fraction):
    texts = texts_of(random.Random(), 2000)
    total = sum(map(len, texts))
    target = max(64 * 1024, fraction * total)
    size = sum(map(len, held([FakePart(texts)], fraction)))
    assert target <= size <= target + 3000


def test_the_choice_depends_neither_on_order_nor_on_how_the_text_is_cut_into_parts():
    rng = random.Random()
    texts = texts_of(rng, 500)
    expected = sorted(held([FakePart(texts)]))
    for _ in range(5):
        rng.shuffle(texts)
        assert sorted(held(in_parts(rng, texts))) == expected


def test_it_is_the_documents_of_smallest_hash():
    texts = texts_of(random.Random(), 1000)
    chosen = held([FakePart(texts)])
    by_hash = sorted(texts, key=content_hash)
    assert sorted(chosen) == sorted(by_hash[: len(chosen)])


def test_copies_of_a_document_are_on_the_same_side():
    rng = random.Random()
    texts = texts_of(rng, 200) * 7
    rng.shuffle(texts)
    parts = in_parts(rng, texts)
    chosen = held(parts)
    assert chosen
    for text in set(chosen):
        assert chosen.count(text) == 7


def test_few_documents_change_sides_when_documents_are_added():
    rng = random.Random()
    texts = texts_of(rng, 1000)
    before = set(held([FakePart(texts)]))
    after = set(held([FakePart(texts + texts_of(rng, 20))]))
    assert len(before & after) >= 0.8 * len(before)


@given(st.lists(st.integers(1, 100_000), min_size=2, max_size=8, unique=True))
def test_of_a_small_source_something_is_held_out_and_at_most_half(sizes):
    texts = [number.to_bytes(4, "big") * size for number, size in enumerate(sizes)]
    total = sum(map(len, texts))
    size = sum(map(len, held([FakePart(texts)])))
    assert 0 < size <= total / 2


def test_a_small_source_gives_a_quarter():
    texts = texts_of(random.Random(), 300, longest=200)
    total = sum(map(len, texts))
    size = sum(map(len, held([FakePart(texts)])))
    assert total / 4 <= size < total / 4 + 200
    assert "a quarter of a small source" in assemble.choose_held_out([FakePart(texts)], 0).note


def test_a_giant_is_passed_over():
    giant = next(
        data for n in range(10**6)
        if content_hash(data := n.to_bytes(4, 'big') * 50_000) < 2**60
    )  # fmt: skip
    texts = [giant, *texts_of(random.Random(), 100, longest=100)]
    assert giant not in held([FakePart(texts)])


def test_a_single_document_however_often_is_refused_with_a_remedy():
    for texts in ([b"one"], [b"one"] * 100):
        with pytest.raises(SourceError, match="add documents"):
            assemble.choose_held_out([FakePart(texts)], 0.001)


# parts and shards


def make_parts(folder, rng, texts, eod=7):
    """Parts of several units as workers leave them; a document's tokens are its bytes."""
    parts = []
    for unit, part in enumerate(in_parts(rng, texts)):
        writer = PartWriter(folder, unit, 0)
        if part.texts:
            tokens = [np.frombuffer(text, np.uint8).astype(np.int32) for text in part.texts]
            writer.add(tokens, part.texts, eod)
        writer.close(len(part.texts), 0, last=True)
        parts += parts_of_unit(folder, unit)
    return parts


@pytest.mark.parametrize("shard_tokens", [1, 100, 5000, 10**9])
def test_shards_hold_every_document_once_in_order_within_their_bound(tmp_path, shard_tokens):
    rng = random.Random()
    texts = texts_of(rng, 300, longest=400)
    (tmp_path / "parts").mkdir()
    parts = make_parts(tmp_path / "parts", rng, texts)
    held_out = assemble.choose_held_out(parts, 0.05)
    plans = assemble.plan_shards(parts, held_out, shard_tokens)
    chosen = set(held_out.hashes.tolist())
    for split, expected in [
        ("train", [text for text in texts if content_hash(text) not in chosen]),
        ("held_out", [text for text in texts if content_hash(text) in chosen]),
    ]:
        found = []
        for plan in (plan for plan in plans if plan.split == split):
            pieces = list(assemble._documents(parts, plan, held_out.hashes))
            tokens = np.concatenate([piece for piece, _ in pieces])
            lengths = np.concatenate([piece for _, piece in pieces])
            assert len(tokens) <= shard_tokens or len(lengths) == 1
            assert plan.text_bytes == len(tokens) - len(lengths)
            for document in np.split(tokens, np.cumsum(lengths)[:-1]):
                assert document[-1] == 7
                found.append(document[:-1].astype(np.uint8).tobytes())
        assert found == expected
    full = [plan for plan in plans if plan.split == "train"][:-1]
    if shard_tokens == 5000:
        assert all(plan.text_bytes > 5000 - 2 * 400 for plan in full)


def test_a_unit_without_its_last_part_is_noticed(tmp_path):
    writer = PartWriter(tmp_path, 0, 0)
    writer.close(0, 0, last=False)
    with pytest.raises(SourceError, match="unit 0 .* begin again"):
        assemble.all_parts(tmp_path, 1)


def test_a_part_made_twice_is_kept_once(tmp_path):
    for text in (b"first", b"second"):
        writer = PartWriter(tmp_path, 3, 0)
        writer.add([np.array([1], np.int32)], [text], 7)
        writer.close(1, 1, last=True)
    (part,) = parts_of_unit(tmp_path, 3)
    assert part.hashes().tolist() == [content_hash(b"first")]
    assert [path.name for path in tmp_path.iterdir()] == [part.path.name]
