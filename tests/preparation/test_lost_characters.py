"""What a tokenizer loses of a text is counted, told, and kept in the manifest."""

import json
import unicodedata

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from stablelm_jax import prepare
from stablelm_jax.data import manifest
from stablelm_jax.tokenizer.tokenizer import load_tokenizer

TEXT = "the cat sat on the mat. été 中文 x²"


def byte_level(normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def without_bytes(unknown):
    """Knows the letters of English alone, and drops others or calls them unknown."""
    vocabulary = {"<|endoftext|>": 0, "<unk>": 1}
    for character in "▁abcdefghijklmnopqrstuvwxyz.":
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def saved(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def lost_by(tokenizer, text):
    return tokenizer.lost_characters(text, tokenizer.encode(text))


@pytest.mark.parametrize(
    "make, lost",
    [
        (lambda: byte_level(), ""),
        (lambda: byte_level(normalizers.NFC()), ""),
        (lambda: byte_level(normalizers.NFKC()), "²"),
        (lambda: byte_level(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
         "éé"),
        (lambda: byte_level(normalizers.Strip()), ""),
        (lambda: without_bytes(None), "éé中文²"),
        (lambda: without_bytes("<unk>"), "éé中文²"),
    ],
)  # fmt: skip
def test_lost_is_what_does_not_come_back_and_another_spelling_of_the_same_is_not(
    make, lost, tmp_path
):
    tokenizer = load_tokenizer(saved(make(), tmp_path))
    for form in ("NFC", "NFD"):
        found = lost_by(tokenizer, unicodedata.normalize(form, TEXT))
        assert "".join(sorted(found.elements())) == "".join(sorted(lost))


def test_arcade100k_loses_nothing():
    text = TEXT + " <|endoftext|> \x00\U0010ffff e\u0301\u0323 \u3000\r\n"
    assert not lost_by(load_tokenizer("arcade100k"), text)


def prepared(tokenizer, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    texts = ["", " "] * 20 + [
        f"{TEXT} {i}" for i in range(40)
    ]  # what gives no document is no sample
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = tmp_path / "data"
    arguments = ["--source", "a", "--input", str(path), "--output", str(data), "--workers", "1"]
    assert prepare.main([*arguments, "--tokenizer", str(saved(tokenizer, tmp_path))]) == 0
    return capsys.readouterr().out, manifest.read_manifest(data / "a").provenance


def test_prepare_warns_of_a_tokenizer_that_drops_characters(tmp_path, capsys):
    said, provenance = prepared(without_bytes(None), tmp_path, capsys)
    lost = provenance["characters_lost"]
    # Of the first 16 documents: each loses its five characters and the digits of its number.
    digits = sum(len(str(i)) for i in range(16))
    assert lost["sampled"] == 16 * (len(TEXT) + 1) + digits
    assert lost["lost"] == 16 * 5 + digits
    assert lost["most_often"]["é"] == 32
    assert "WARNING: lost by the tokenizer: 1" in said and "'é'" in said


def test_prepare_says_that_nothing_is_lost(tmp_path, capsys):
    said, provenance = prepared(byte_level(), tmp_path, capsys)
    lost = provenance["characters_lost"]
    assert lost["lost"] == 0 < lost["sampled"]
    assert f"lost by the tokenizer: none of {lost['sampled']:,} characters" in said
