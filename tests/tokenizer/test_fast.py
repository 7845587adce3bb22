"""quicktok gives tiktoken's ids, or is not used."""

import sys
import types

import numpy as np
import pytest
from seeds import new_rng

from stablelm_jax.tokenizer import fast
from stablelm_jax.tokenizer.tokenizer import TokenizerError, load_tokenizer

ODD = [
    "\u0301\u0300" * 300, "a\u030a" * 400, " " * 300_001 + "x", "\n" * 70_000, "!" * 70_000,
    "x" * 70_000, "don't\u017f 'LL", "\x85\u2028 \t\r\n", "<|endoftext|>a<|im_end|>", "",
]  # fmt: skip


@pytest.fixture(scope="module")
def quick():
    pytest.importorskip("quicktok")
    tokenizer = load_tokenizer("arcade100k")
    tokenizer.use_fast_engine()
    assert tokenizer.engine.startswith("quicktok ")
    return tokenizer


@pytest.fixture(scope="module")
def plain():
    return load_tokenizer("arcade100k")


def mixtures(rng, count):
    """Texts of letters, digits, marks and blanks of many scripts in no order at all."""
    ranges = [(0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x600, 0x700),
              (0x900, 0x980), (0x2000, 0x2070), (0x3000, 0x3100), (0x4E00, 0x4F00),
              (0x1F300, 0x1F400)]  # fmt: skip
    pool = [chr(c) for first, last in ranges for c in range(first, last)] + list(" \n\r\t'sd1") * 40
    return ["".join(rng.choice(pool, rng.integers(1, 200))) for _ in range(count)]


def test_ids_are_tiktokens_one_by_one_and_in_a_batch(quick, plain):
    texts = mixtures(new_rng(), 400) + ODD
    expected = [[*plain.encode_document(text), plain.eod] for text in texts]
    for text, ids, found in zip(texts, expected, quick.encode_documents(texts)):
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, ids, err_msg=repr(text[:80]))
        assert quick.agrees(text, found)
    assert quick.encode_documents([]) == []
    assert not quick.agrees("one two", np.array([1, 2, plain.eod], np.int32))


def test_a_text_without_ids_costs_itself(quick):
    first, error, last = quick.encode_documents(["one", "a\ud800b", "two"])
    assert isinstance(error, TokenizerError)
    assert quick.decode(first[:-1]) == "one" and quick.decode(last[:-1]) == "two"


class Wrong:
    def __init__(self, name, folder):
        pass

    def encode_batch(self, texts, threads):
        lengths = np.cumsum([0, *map(len, texts)])
        return np.zeros(lengths[-1], np.uint32), lengths


@pytest.mark.parametrize("wrong", [Wrong, None])
def test_an_engine_that_gives_other_ids_or_none_is_not_used_and_says_why(monkeypatch, wrong):
    module = types.ModuleType("quicktok")
    module.import_tokenizer, module.Tokenizer = (lambda *_: None), wrong
    monkeypatch.setitem(sys.modules, "quicktok", module)
    monkeypatch.setattr(fast, "find_spec", lambda name: module)
    monkeypatch.setattr(fast, "version", lambda name: "0")
    tokenizer = load_tokenizer("arcade100k")
    tokenizer.use_fast_engine()
    assert ("other ids" if wrong else "cannot be used") in tokenizer.engine_problem
    assert tokenizer.engine.startswith("tiktoken ")
    assert tokenizer.decode(tokenizer.encode_documents(["one two"])[0][:-1]) == "one two"


def test_without_it_tiktoken_is_the_engine(monkeypatch):
    monkeypatch.setattr(fast, "find_spec", lambda name: None)
    tokenizer = load_tokenizer("arcade100k")
    tokenizer.use_fast_engine()
    assert tokenizer.engine.startswith("tiktoken ")
