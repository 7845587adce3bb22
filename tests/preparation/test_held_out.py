"""What is held out: enough of every kind of source, and the same for copies of a document."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stablelm_jax.preparation import chunks, held_out, inputs
from stablelm_jax.preparation.formats import Reading
from stablelm_jax.preparation.held_out import Look, content_hash


def texts_of(rng, count, longest=3000, shortest=1):
    return [rng.randbytes(rng.randint(shortest, longest)) for _ in range(count)]


def seen(texts):
    found = {}
    for text in texts:
        copies = found.setdefault(content_hash(text), [0, 0])
        copies[0] += 1
        copies[1] += len(text)
    return Look(found)


def held(texts, fraction=0.001):
    rule = held_out.choose(seen(texts), fraction)
    return [text for text in texts if rule.holds_out(content_hash(text))]


@pytest.mark.parametrize(
    ("documents", "size", "expected"),
    [
        (729, 16_000, 36),  # 5 % of them
        (10, 5_000, 1),
        (2, 50, 1),
        (1_000, 1_000, 50),  # 256 kB would be more than 5 %
        (1_500, 50_000, 50),
        (5_000, 4_000, 64),  # 256 kB
        (20_000, 100, 1_000),  # 5 %
        (60_000, 100, 2_560),
    ],
)
def test_of_documents_of_one_size_as_many_are_held_out_as_the_rule_says(documents, size, expected):
    copies = {content_hash(str(number).encode()): [1, size] for number in range(documents)}
    rule = held_out.choose(Look(copies), 0.001)
    chosen = sorted(filter(rule.holds_out, copies))
    assert chosen == sorted(copies)[:expected]
    assert rule.passed_over == []


@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.04, 0.25])
def test_a_fraction_that_is_asked_for_is_held_out_and_hardly_more(fraction):
    texts = texts_of(random.Random(1), 4000)
    total = sum(map(len, texts))
    size = sum(map(len, held(texts, fraction)))
    wanted = max(256_000, fraction * total)
    # Of more than 5 % no more documents are taken than text is asked for.
    assert (0.99 if fraction > 0.05 else 1) * wanted <= size <= wanted + 3000


def test_the_choice_depends_neither_on_order_nor_on_what_lies_where():
    rng = random.Random(2)
    texts = texts_of(rng, 500)
    expected = sorted(held(texts))
    for _ in range(5):
        rng.shuffle(texts)
        assert sorted(held(texts)) == expected


def test_copies_of_a_document_are_on_the_same_side():
    rng = random.Random(3)
    texts = texts_of(rng, 200) * 7
    chosen = held(texts)
    assert 0 < len(chosen) <= 70
    assert all(chosen.count(text) == 7 for text in chosen)


def test_few_documents_change_sides_when_documents_are_added():
    rng = random.Random(4)
    texts = texts_of(rng, 1000)
    before = set(held(texts))
    after = set(held(texts + texts_of(rng, 20)))
    assert len(before & after) >= 0.8 * len(before)


@given(st.lists(st.integers(1, 100_000), min_size=2, max_size=60, unique=True))
def test_of_few_documents_of_any_size_something_is_held_out_and_at_most_half_the_text(sizes):
    texts = [number.to_bytes(4, "big") * size for number, size in enumerate(sizes)]
    size = sum(map(len, held(texts)))
    assert 0 < size <= sum(map(len, texts)) / 2


@given(st.lists(st.integers(1, 60), min_size=2, max_size=60), st.randoms(use_true_random=False))
def test_with_any_number_of_copies_both_sides_have_documents(copies, rng):
    texts = [bytes([number]) * 50 for number, count in enumerate(copies) for _ in range(count)]
    rng.shuffle(texts)
    chosen = held(texts)
    assert 0 < len(chosen) <= len(texts) / 2


def test_a_giant_and_a_much_copied_document_are_passed_over():
    small = texts_of(random.Random(5), 100, longest=100)
    numbers = (number.to_bytes(4, "big") for number in range(10**6))
    giant = next(data for n in numbers if content_hash(data := n * 50_000) < 2**58)
    assert giant not in held([giant, *small])
    copied = next(n for n in numbers if content_hash(n) < 2**58)
    texts = [copied] * 20 + small
    rule = held_out.choose(seen(texts), 0.001)
    assert content_hash(copied) in rule.passed_over
    assert 0 < len(held(texts)) <= 6


def test_of_a_single_document_however_often_nothing_is_held_out():
    assert held([b"one"]) == held([b"one"] * 100) == held([]) == []


# a part of a large source was seen


@pytest.mark.parametrize(
    ("documents", "size", "fraction", "share"),
    [
        (10**9, 5_000, 0.001, 0.001),
        (10**9, 8_000, 0, 62.5e-9),
        (2_000, 500_000, 0.001, 0.03125),  # 50 documents and a quarter more
        (1_100, 500_000, 0.001, 0.05),
        (1_100, 500_000, 0.2, 0.2),
        (10**6, 100, 0.001, 0.0032),  # 256 kB and a quarter more
    ],
)
def test_the_threshold_of_a_large_source_follows_from_an_estimate(documents, size, fraction, share):
    part = Look({number: [1, size] for number in range(1000)}, 1000 / documents, whole=False)
    assert held_out.choose(part, fraction).threshold / 2**64 == pytest.approx(share)


def cut_of(folder, texts):
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return chunks.cut(inputs.find_files([str(path)]))


def test_the_first_look_reads_a_small_source_whole_and_a_large_one_in_part(tmp_path, monkeypatch):
    texts = [f"{number:05d}" * 100 for number in range(20_000)]
    source = cut_of(tmp_path, [*texts, texts[0]])
    look = held_out.look(source, Reading())
    assert look.whole and len(look.found) == 20_000
    assert look.found[content_hash(texts[0].encode())] == [2, 1000]
    monkeypatch.setattr(held_out, "_LOOK_BYTES", 2_000_000)
    look = held_out.look(source, Reading())
    assert not look.whole and len(look.found) == 4_000
    # What was read in vain counts too: a mebibyte at most.
    assert 4_000 / 20_001 <= look.share <= 0.3
    monkeypatch.setattr(held_out, "_LOOK_DOCUMENTS_MOST", 2_000)
    assert len(held_out.look(source, Reading()).found) == 2_000
    monkeypatch.undo()
    monkeypatch.setattr(held_out, "_LOOK_BYTES", 10)
    assert len(held_out.look(source, Reading()).found) == 1_000
