"""Long runs are cut, and marks sorted, without a change to any id or character."""

from __future__ import annotations

import sys
import unicodedata

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stablelm_jax.tokenizer import long_text
from stablelm_jax.tokenizer.tokenizer import PATTERN, load_tokenizer

BLANKS = "\t\v\f \x85\xa0\u1680\u2003\u2028\u3000"
# Each kind of character that the split pattern tells apart, and 0x1c, whitespace to Python alone.
WHITESPACE_HEAVY = st.text(
    st.sampled_from(BLANKS + "\r\n" + " " * 12 + "\t\t\t" + "a'sT1½.!\u0301\x1c\u200b中😶"),
    max_size=40,
)
MARKS = "\u0301\u0316\u0327\u0345\u0344\u0f71\u0f72\u0f73\u05b0\u3099"


def pieces(text: str) -> list[str]:
    return regex.findall(PATTERN, text)


def pieces_of_parts(text: str, limit: int) -> list[str]:
    found = []
    for start, end, is_piece in long_text.split_long_runs(text, limit):
        found += [text[start:end]] if is_piece else pieces(text[start:end])
    return found


@settings(max_examples=500, deadline=None)
@given(WHITESPACE_HEAVY, st.integers(2, 6))
@example(".\n\n  \n   x", 2)
@example("a   ", 2)
@example("    1", 3)
@example("a\x1c  \x1c", 2)
@example("\r  \r\n   .", 2)
def test_the_parts_of_a_text_split_into_the_pieces_of_the_whole(text, limit):
    assert pieces_of_parts(text, limit) == pieces(text)


@settings(max_examples=500, deadline=None)
@given(WHITESPACE_HEAVY, st.integers(2, 6))
def test_no_part_but_a_piece_holds_a_long_run_the_engine_would_stack(text, limit):
    for start, end, is_piece in long_text.split_long_runs(text, limit):
        runs = regex.findall(f"{long_text.BLANK}++(?![\\r\\n])", text[start:end])
        # A part may end in the last blank before the next word, never in a longer run.
        assert is_piece or max(map(len, runs), default=0) < limit


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 40), st.integers(10, 30), st.sampled_from(BLANKS))
def test_a_long_run_is_found_wherever_it_stands(offset, length, blank):
    text = "x" * offset + blank * length + "y"
    found = [part for part in long_text.split_long_runs(text, 10) if part[2]]
    assert found == [(offset, offset + length - 1, True)]


def test_blanks_are_the_whitespace_of_the_engine_without_line_ends():
    # A text is encoded as what the pattern matches: all other characters vanish.
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]))
    engine = load_tokenizer("arcade100k")._engine(r"[^\S\r\n]")
    found = engine.decode(engine.encode_ordinary(everything))
    assert found == "".join(regex.findall(long_text.BLANK, everything))
    assert found.isspace()


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ae\u0f71가\u1100\u1161é " + MARKS * 2), max_size=30))
def test_sorting_marks_leaves_the_normal_form_as_it_was(text):
    ordered = long_text.sort_marks(text)
    assert sorted(ordered) == sorted(text)
    assert unicodedata.normalize("NFC", ordered) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("offset", [0, 1, 100, 255, 1000])
def test_a_long_run_of_marks_is_found_wherever_it_stands(offset, monkeypatch):
    sorted_texts = []
    monkeypatch.setattr(long_text, "sort_marks", lambda text: sorted_texts.append(text) or text)
    long_text.normalise("é" * offset + "\u0316\u0301" * (long_text.LONG_MARKS // 2) + "x")
    assert len(sorted_texts) == 1
    long_text.normalise("é" * offset + "\u0316\u0301" * 32 + "x")
    assert len(sorted_texts) == 1


def test_half_a_million_marks_are_normalised_to_their_canonical_order():
    # By insertion sort this takes minutes.
    text = "a" + "\u0301\u0316" * 250_000
    assert long_text.normalise(text) == "á" + "\u0316" * 250_000 + "\u0301" * 249_999
