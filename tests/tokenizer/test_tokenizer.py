"""Arcade100k is the published tokenizer; a tokenizer.json means what its library says; no document
stops either."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stablelm_jax.tokenizer import tokenizer as module
from stablelm_jax.tokenizer.tokenizer import SPECIAL_TOKENS, TokenizerError, load_tokenizer

# The stress text of llama.cpp's converter and the hash it knows `stablelm2` by: sha256(str(ids)).
STRESS_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis "
    "concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
STRESS_HASH = "32d85c31273f8019248f2559fed492d929ea28b17e51d81d3bb36fff23ca72b3"
PATTERN_HEAVY = st.text(
    st.one_of(
        st.sampled_from(" \t\r\n\v\x85\xa0\u3000\x1c '\"!.-_aBsTlLſ12½中😶\u0301é"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=60,
)


@pytest.fixture(scope="module")
def arcade():
    return load_tokenizer("arcade100k")


@pytest.fixture(scope="module")
def published(arcade):
    """tiktoken alone with the pattern as published."""
    return tiktoken.Encoding(
        "published",
        pat_str=module.PATTERN,
        mergeable_ranks=arcade.ranks,
        special_tokens=arcade.specials,
    )


# --- Arcade100k ---


def test_arcade100k_encodes_the_stress_text_as_llama_cpp_knows_it(arcade):
    assert hashlib.sha256(str(arcade.encode(STRESS_TEXT)).encode()).hexdigest() == STRESS_HASH


def test_the_special_tokens_have_their_published_ids(arcade):
    published_ids = {
        '<|endoftext|>': 100257, '<|fim_prefix|>': 100258, '<|fim_suffix|>': 100260,
        '<|fim_pad|>': 100261, '<gh_stars>': 100262, '<jupyter_start>': 100267,
        '<commit_before>': 100272, '<reponame>': 100275, '<|endofprompt|>': 100276,
        '<|im_start|>': 100277, '<|im_end|>': 100278, '<|pause|>': 100279, '<|reg0|>': 100280,
        '<|reg7|>': 100287, '<|extra0|>': 100288,
    }  # fmt: skip
    assert len(SPECIAL_TOKENS) == len(set(SPECIAL_TOKENS)) == 32
    for token, token_id in published_ids.items():
        assert arcade.encode(token, specials=True) == [token_id]
        assert arcade.decode([token_id]) == token
    assert arcade.eod == 100257
    assert arcade.encode("".join(SPECIAL_TOKENS), specials=True) == list(range(100257, 100289))


def test_ids_are_below_100352_and_100256_is_a_hole(arcade):
    assert arcade.vocab_size == 100352
    assert sorted(arcade.ranks.values()) == list(range(100256))


def test_every_digit_is_a_token(arcade):
    assert [arcade.decode([i]) for i in arcade.encode("x12345")] == ["x", "1", "2", "3", "4", "5"]


def test_composed_and_decomposed_spellings_have_the_same_ids(arcade):
    assert arcade.encode("Cafe\u0301 \u1100\u1161") == arcade.encode("Caf\xe9 \uac00")


@settings(max_examples=400, deadline=None)
@given(text=PATTERN_HEAVY)
@example(text="a\n  ")
@example(text="'ſ 'S\u0301")
def test_the_grouped_pattern_splits_as_the_published_one(arcade, published, text):
    assert arcade.encode(text) == published.encode_ordinary(unicodedata.normalize("NFC", text))


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.one_of(PATTERN_HEAVY, st.sampled_from(SPECIAL_TOKENS)), max_size=6))
def test_decoding_gives_back_the_nfc_of_a_text_and_no_spelling_becomes_a_special(arcade, parts):
    text = "".join(parts)
    ids = arcade.encode(text)
    assert arcade.decode(ids) == unicodedata.normalize("NFC", text)
    assert max(ids, default=0) < 100256


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.one_of(PATTERN_HEAVY, st.sampled_from(SPECIAL_TOKENS)), max_size=6))
@example(parts=["e\u0301 <|im_end|>", "\u0338<|endoftext|>"])
def test_specials_asked_for_are_those_of_tiktoken(arcade, published, parts):
    text = "".join(parts)
    expected = published.encode(unicodedata.normalize("NFC", text), allowed_special="all")
    assert arcade.encode(text, specials=True) == expected


def test_ids_without_text_are_replaced(arcade):
    assert arcade.decode([64, 100256, 100351, 64]) == "a\ufffd\ufffda"


def test_a_document_is_an_int32_array_of_the_same_ids(arcade):
    for text in ("", "one", STRESS_TEXT, "e\u0301<|endoftext|>"):
        array = arcade.encode_document(text)
        assert array.dtype == np.int32 and array.tolist() == arcade.encode(text)
    assert arcade.decode(arcade.encode_document(STRESS_TEXT)) == unicodedata.normalize(
        "NFC", STRESS_TEXT
    )


def test_a_pickled_arcade100k_gives_the_same_ids(arcade):
    assert pickle.loads(pickle.dumps(arcade)).encode(STRESS_TEXT) == arcade.encode(STRESS_TEXT)


def test_the_hash_is_pinned_and_follows_each_rule(arcade, monkeypatch):
    assert arcade.sha256 == "f209ad9c1ee0e57b1778fc22fbc45515db60f37da798c9af70ab80e4b4266983"
    found = {arcade.sha256, module.Arcade100k(b"YQ== 0\n").sha256}
    others = {"PATTERN": "x", "SPECIAL_TOKENS": (*SPECIAL_TOKENS, "x"), "FIRST_SPECIAL": 1}
    for rule, other in others.items():
        with monkeypatch.context() as patch:
            patch.setattr(module, rule, other)
            found.add(module.Arcade100k(b"YQ== 0\n").sha256)
    assert len(found) == 5


# --- documents no engine should be given whole ---


@settings(max_examples=400, deadline=None)
@given(text=PATTERN_HEAVY, limit=st.integers(2, 5))
@example(text=".\n   \n      x", limit=2)
def test_long_runs_of_whitespace_keep_their_ids_when_cut(arcade, text, limit):
    text = unicodedata.normalize("NFC", text)
    assert arcade._encode_normal(text, limit).tolist() == arcade.encode(text)


@pytest.mark.parametrize("before", ["", "x", "!\n", "x \n\t"])
@pytest.mark.parametrize("after", ["", "x", "!", "1", "\n", "\n  x"])
def test_a_run_the_engine_can_still_do_has_the_same_ids_cut(arcade, published, before, after):
    text = before + " \t\u3000" * 70_000 + after
    assert arcade.encode(text) == published.encode_ordinary(text)


@pytest.mark.parametrize("blank", [" ", "\t"])
def test_a_million_blanks_are_encoded(arcade, blank):
    run = blank * 1_000_000
    ids = arcade.encode(f"one\n{run}two")
    assert arcade.decode(ids) == f"one\n{run}two"
    assert ids[-1:] == arcade.encode(f"{blank}two")[-1:]
    assert arcade.encode(f"{run}<|im_end|>{run}", specials=True).count(100278) == 1


@pytest.mark.parametrize("character", ["a", "-", "\n", "\u0301"])
def test_a_million_of_anything_else_is_encoded(arcade, character):
    text = character * 1_000_000
    assert arcade.decode(arcade.encode(text)) == text


def test_a_panic_of_the_engine_rejects_the_document(published, capfd):
    text = " " * 1_000_000
    with pytest.raises(BaseException, match="Result::unwrap") as raised:
        published.encode_ordinary(text)
    assert not isinstance(raised.value, Exception)
    with pytest.raises(TokenizerError, match="cannot be encoded"):
        with module._failing_alone(text):
            published.encode_ordinary(text)


def test_a_document_is_rejected_and_the_next_one_encoded(arcade):
    with pytest.raises(TokenizerError, match="surrogates"):
        arcade.encode_document("not \ud800")
    assert len(arcade.encode_document("fine")) == 1


def test_what_is_no_fault_of_the_text_is_not_called_one(arcade):
    with pytest.raises(KeyboardInterrupt):
        with module._failing_alone("text"):
            raise KeyboardInterrupt
    with pytest.raises((TypeError, AttributeError)):
        arcade.encode(b"bytes")


def test_the_module_is_imported_without_jax_and_without_an_engine():
    code = (
        "import sys, stablelm_jax.tokenizer.tokenizer; "
        'print([m for m in ("jax", "tiktoken", "tokenizers") if m in sys.modules])'
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- a Hugging Face tokenizer.json ---


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    """A byte-level BPE that cuts, pads and puts a token in front, as some files ask for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(["hello world, hello there"] * 10, trainer)
    engine.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    engine.enable_truncation(4)
    engine.enable_padding(length=16)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    engine.save(str(path))
    return path


@pytest.fixture(scope="module")
def bpe(json_file):
    return load_tokenizer(json_file)


def test_a_tokenizer_json_is_known_by_its_bytes(bpe, json_file):
    assert bpe.sha256 == hashlib.sha256(json_file.read_bytes()).hexdigest()
    assert (bpe.name, bpe.eod) == (str(json_file), 0)
    assert load_tokenizer(json_file.parent).sha256 == bpe.sha256


def test_rows_of_a_tokenizer_json_are_padded_to_a_multiple_of_128(bpe):
    assert bpe.vocab_size == 384


def test_a_tokenizer_json_neither_cuts_nor_pads_nor_adds(bpe):
    text = "hello world, hello there, 😶 wörld" * 3
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert not {0, 1} & set(ids)
    array = bpe.encode_document(text)
    assert (array.dtype, array.tolist()) == (np.int32, ids)


def test_specials_of_a_tokenizer_json_are_text_unless_asked_for_even_after_pickling(bpe):
    text = "hello<|endoftext|><|padding|>"
    for tokenizer in (bpe, pickle.loads(pickle.dumps(bpe))):
        assert not {0, 1} & set(tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text, specials=True)[-2:] == [0, 1]


def test_text_cannot_forge_an_end_of_document_that_the_json_does_not_call_special(
    json_file, tmp_path
):
    spec = json.loads(json_file.read_bytes())
    spec["added_tokens"][0]["special"] = False
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    assert 0 not in load_tokenizer(path).encode("hello<|endoftext|>")


def test_unknown_ids_of_a_tokenizer_json_are_replaced(bpe):
    hello = bpe.encode("hello")
    assert bpe.decode([*hello, 383, 383, *hello]) == "hello\ufffd\ufffdhello"


def test_a_lone_surrogate_rejects_the_document_of_a_tokenizer_json(bpe):
    with pytest.raises(TokenizerError):
        bpe.encode_document("\ud800")
    with pytest.raises(TypeError):
        bpe.encode(None)


def test_what_is_no_tokenizer_is_refused_by_name(json_file, tmp_path):
    with pytest.raises(ValueError, match="'arcade10k'.*tokenizer.json"):
        load_tokenizer("arcade10k")
    with pytest.raises(ValueError, match="leave them out"):
        load_tokenizer(json_file, ranks="somewhere")
    path = tmp_path / "tokenizer.json"
    no_model = '{"added_tokens": [{"content": "<|endoftext|>"}]}'
    for content in ("{", "[]", '{"added_tokens": null}', no_model):
        path.write_text(content)
        with pytest.raises(ValueError, match="not a Hugging Face tokenizer.json"):
            load_tokenizer(path)
    spec = json.loads(json_file.read_bytes())
    spec["added_tokens"] = spec["added_tokens"][1:]
    path.write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="add <.endoftext.> there"):
        load_tokenizer(path)
