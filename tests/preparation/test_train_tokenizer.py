import json

import pytest

from stablelm_jax.preparation import train_tokenizer
from stablelm_jax.tokenizer.tokenizer import load_tokenizer

TEXTS = [f"def function_{i}(x):\n    return x + {i}  # größer\n" * 20 for i in range(40)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def trained(corpus, output, rows=320):
    arguments = ["--input", str(corpus), "--output", str(output), "--rows", str(rows)]
    assert train_tokenizer.main(arguments) == 0
    return load_tokenizer(output)


def test_any_text_comes_back_and_the_text_it_learned_from_is_shorter(corpus, tmp_path):
    tokenizer = trained(corpus, tmp_path / "tokenizer.json")
    for text in (TEXTS[0], "never seen: 日本語 \t\n\n 1234 <|endoftext|>", "\x00\x7f ü"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2.5


def test_it_splits_as_arcade100k_does_one_digit_at_a_time(corpus, tmp_path):
    tokenizer = trained(corpus, tmp_path / "tokenizer.json")
    assert len(tokenizer.encode("123456")) == 6
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")  # NFC


def test_the_end_of_text_is_a_token_that_text_cannot_spell(corpus, tmp_path):
    tokenizer = trained(corpus, tmp_path / "tokenizer.json")
    assert tokenizer.eod not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.encode("<|endoftext|>", specials=True) == [tokenizer.eod]


def test_the_same_text_gives_the_same_file_and_a_file_that_is_there_is_kept(corpus, tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    trained(corpus, first)
    trained(corpus, second)
    assert first.read_bytes() == second.read_bytes()
    before = second.read_bytes()
    trained(corpus, second, rows=400)
    assert second.read_bytes() == before


def test_too_few_rows_for_the_bytes_are_refused(corpus, tmp_path, capsys):
    arguments = ["--input", str(corpus), "--output", str(tmp_path / "t.json"), "--rows", "200"]
    assert train_tokenizer.main(arguments) == 1
    assert "need 257 at least" in capsys.readouterr().err
    assert not (tmp_path / "t.json").exists()
