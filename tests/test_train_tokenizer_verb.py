"""`train_tokenizer`: what it learns, what it reads, what it leaves behind."""

import gzip
import json
import os
import re
import subprocess
import sys

import fsspec
import pytest

from stablelm_jax import prepare, train_tokenizer
from stablelm_jax.preparation import chunks
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


def test_the_same_text_gives_the_same_file_and_the_same_command_keeps_it(corpus, tmp_path, capsys):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    trained(corpus, first)
    trained(corpus, second)
    assert first.read_bytes() == second.read_bytes()
    before = second.stat()
    trained(corpus, second)
    assert second.stat() == before
    assert "second.json: kept" in capsys.readouterr().out


def test_a_file_that_other_settings_made_is_neither_kept_in_silence_nor_replaced(
    corpus, tmp_path, capsys
):
    output = tmp_path / "tokenizer.json"
    trained(corpus, output)
    before = output.read_bytes()
    other = tmp_path / "other.jsonl"
    other.write_text(corpus.read_text() + corpus.read_text())
    for flags in (("--rows", "400"), ("--rows", "320", "--text-key", "x"), ("--input", str(other))):
        arguments = ["--input", str(corpus), "--output", str(output), "--rows", "320", *flags]
        assert train_tokenizer.main(arguments) == 1
        assert "choose another --output" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_of_much_text_a_sample_is_read_from_all_over_the_input(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(chunks, "_MIN_CHUNK_BYTES", 400)
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("first", "second", "third"):
        (folder / f"{name}.jsonl").write_text((json.dumps({"text": f"{name} " * 5}) + "\n") * 200)
    arguments = ["--input", str(folder), "--output", str(tmp_path / "t.json"), "--rows", "280"]
    assert train_tokenizer.main([*arguments, "--max-bytes", "3000"]) == 0
    said = capsys.readouterr().out
    assert "a sample" in said
    assert 80 < int(re.search(r"from (\d+) documents", said)[1]) < 200
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert all(len(tokenizer.encode(name)) < 3 for name in ("first", "second", "third"))


def test_too_few_rows_for_the_bytes_are_refused(corpus, tmp_path, capsys):
    arguments = ["--input", str(corpus), "--output", str(tmp_path / "t.json"), "--rows", "200"]
    assert train_tokenizer.main(arguments) == 1
    assert "need 257 at least" in capsys.readouterr().err
    assert not (tmp_path / "t.json").exists()


GOOD = "".join(json.dumps({"text": f"a good line number {i}"}) + "\n" for i in range(4))
UNUSABLE = {
    "empty line": "\n",
    "'text' is a JSON null": '{"text": null}\n',
    "a JSON array": "[1, 2]\n",
    "no key 'text'": '{"content": "other key"}\n',
    "not Unicode": '{"text": "lone \\ud800 half"}\n',
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_a_record_without_a_text_is_counted_and_the_others_are_learned(reason, tmp_path, capsys):
    path = tmp_path / "mixed.jsonl"
    path.write_text(GOOD + UNUSABLE[reason] + GOOD)
    trained(path, tmp_path / "tokenizer.json")
    shown = capsys.readouterr().out
    assert "rejected: 1 (" in shown and reason in shown and "mixed.jsonl, line 5" in shown
    assert "from 8 documents" in shown


def test_it_reads_folders_patterns_compressed_and_plain_files_as_prepare_does(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\ufeff" + GOOD, encoding="utf-8")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(GOOD.encode()))
    (folder / "c.txt").write_text("plain words\n" * 9)
    whole = trained(folder, tmp_path / "folder.json")
    assert len(whole.encode("plain")) < 5
    pattern = trained(f"{folder}/*", tmp_path / "pattern.json")
    assert pattern.sha256 == whole.sha256


def test_text_key_names_where_the_text_is(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({"content": "other other other"}) + "\n")
    arguments = ["--input", str(path), "--output", str(tmp_path / "t.json"), "--rows", "280"]
    assert train_tokenizer.main([*arguments, "--text-key", "content"]) == 0
    assert len(load_tokenizer(tmp_path / "t.json").encode("other")) == 1


@pytest.mark.parametrize("content", ["", "[1]\n", " \n"])
def test_an_input_without_any_text_is_an_error_and_leaves_nothing(content, tmp_path, capsys):
    path = tmp_path / "none.jsonl"
    path.write_text(content)
    arguments = ["--input", str(path), "--output", str(tmp_path / "t.json"), "--rows", "300"]
    assert train_tokenizer.main(arguments) == 1
    assert "no usable document" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["none.jsonl"]


def test_the_module_of_the_training_is_the_verb_too(corpus, tmp_path):
    output = tmp_path / "tokenizer.json"
    command = [sys.executable, "-m", "stablelm_jax.tokenizer.train_tokenizer", "--rows", "270"]
    subprocess.run([*command, "--input", corpus, "--output", output], check=True, timeout=120)
    assert load_tokenizer(output).largest_id == 269


@pytest.mark.parametrize("place", ["none/t.json", "."])
def test_a_place_that_takes_no_file_is_found_before_anything_is_read(
    corpus, tmp_path, place, capsys, monkeypatch
):
    monkeypatch.setattr(train_tokenizer, "_train", lambda flags: pytest.fail("it began"))
    output = str(tmp_path / place)
    assert train_tokenizer.main(["--input", str(corpus), "--output", output]) == 1
    assert capsys.readouterr().err.startswith(f"train_tokenizer: {tmp_path / place}")


def test_its_output_within_the_input_is_left_out_the_first_time_and_the_second(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("\n".join(TEXTS))
    trained(tmp_path / "in", tmp_path / "in/tokenizer.json")
    trained(tmp_path / "in", tmp_path / "in/tokenizer.json")
    assert "kept" in capsys.readouterr().out
    arguments = ["--source", "s", "--input", str(tmp_path / "in"), "--output", str(tmp_path)]
    arguments += ["--tokenizer", str(tmp_path / "in/tokenizer.json"), "--split-on", "2kB"]
    assert prepare.main([*arguments, "--workers", "1"]) == 0
    assert "left out: the tokenizer" in capsys.readouterr().out


def test_what_is_left_out_is_said(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("\n".join(TEXTS))
    (tmp_path / "in/gone").symlink_to("nowhere")
    trained(tmp_path / "in", tmp_path / "tokenizer.json")
    out = capsys.readouterr().out
    assert f"left out: {tmp_path / 'in/gone'}, a link that leads nowhere" in out


def test_a_driver_of_a_url_that_fails_is_one_line(tmp_path, capsys, monkeypatch):
    class DriverError(Exception):
        pass

    def fail(*_):
        raise DriverError("connection reset")

    fsspec.filesystem("memory").pipe("/driver/a.txt", b"one text")
    monkeypatch.setattr(chunks, "read_chunk", fail)
    arguments = ["--input", "memory://driver/a.txt", "--output", str(tmp_path / "t.json")]
    assert train_tokenizer.main(arguments) == 1
    assert "DriverError: connection reset" in capsys.readouterr().err


def test_a_split_that_cuts_nothing_is_refused(corpus, tmp_path, capsys):
    arguments = ["--input", str(corpus), "--output", str(tmp_path / "t.json")]
    assert train_tokenizer.main([*arguments, "--split-on", "blank-lines"]) == 1
    assert "--split-on cuts texts" in capsys.readouterr().err
