"""The list of merges does what the ranks do, in somebody else's engine."""

from __future__ import annotations

import sysconfig
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from stablelm_jax.interop.bpe_merges import merges
from stablelm_jax.tokenizer.ranks import spelled
from stablelm_jax.tokenizer.tokenizer import PATTERN, load_tokenizer


@pytest.fixture(scope="module")
def arcade():
    return load_tokenizer("arcade100k")


@pytest.fixture(scope="module")
def listed(arcade):
    return merges(arcade.ranks)


@pytest.fixture(scope="module")
def engine(arcade, listed):
    """`tokenizers` with the merges, and a split into words that is Arcade100k's."""
    vocabulary = {spelled(token): rank for token, rank in arcade.ranks.items()}
    pairs = [(spelled(left), spelled(right)) for left, right in listed]
    engine = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return engine


def test_every_token_of_arcade100k_has_one_merge_in_order_of_rank(arcade, listed):
    joined = [arcade.ranks[left + right] for left, right in listed]
    assert joined == list(range(256, 100_256))


def test_a_byte_is_spelled_as_tokenizers_spells_it():
    spellings = {spelled(bytes([byte])) for byte in range(256)}
    assert spellings == set(pre_tokenizers.ByteLevel.alphabet())
    assert spelled("é x\n".encode()) == "Ã©ĠxĊ"


def test_ranks_that_never_make_a_token_are_refused():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"bc": 256, b"ab": 257, b"abc": 258}
    assert merges(ranks) == [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc")]
    with pytest.raises(ValueError, match=r"never join b'bcde' \(rank 259\)"):
        merges(ranks | {b"bcde": 259})


def test_merges_give_tiktokens_ids_on_source_code(arcade, engine):
    folder = Path(sysconfig.get_path("stdlib"))
    for name in ("argparse.py", "decimal.py", "html/entities.py", "turtle.py"):
        same_ids(arcade, engine, (folder / name).read_text())


@given(
    st.text(
        st.one_of(
            st.sampled_from(" \t\r\n'!.-_=aabbTstnioe12½中文字é的я😶"),
            st.characters(exclude_categories=["Cs"]),
        )
    )
)
@example("a" * 500 + "ab" * 300)
@example(" " * 300 + "\n" * 90 + "=" * 200 + "的" * 50)
def test_merges_give_tiktokens_ids_on_any_text(arcade, engine, text):
    same_ids(arcade, engine, text)


def same_ids(arcade, engine, text):
    ours = arcade.encode(text)
    assert engine.encode(unicodedata.normalize("NFC", text)).ids == ours
