"""Texts and pages: one document a file, or as many as it is split into."""

import gzip
import subprocess
import sys
import zipfile

import pytest
from read_documents import read, records, write

from stablelm_jax.preparation import formats, streams, texts
from stablelm_jax.preparation.inputs import InputError, find_files

PAGE = "<html><head><title>T</title></head><body><nav>menu</nav><p>Größer {}</p></body></html>"


def test_a_text_file_is_one_document(tmp_path):
    text = "first line\nsecond line: äöü\r\n"
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbf" + text.encode())) == [text]
    assert read(write(tmp_path / "a.py.gz", gzip.compress(text.encode()))) == [text]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty document"),
        (b"\n \n", "empty document"),
        (b"one\ntwo\ncaf\xe9\n", "not UTF-8: 0xe9 on line 3"),
        (b"\x7fELF\x00\x01", "program or library, not text"),
        (b"PK\x03\x04\x14\0", "zip archive, not text"),
        (b"%PDF-1.7\n1 0 obj", "PDF, not text"),
        (b"\x89PNG\r\n\x1a\n", "PNG image, not text"),
        (b"\xff\xd8\xff\xe0", "JPEG image, not text"),
        (b"SQLite format 3\0", "SQLite database, not text"),
        (b"\x80\x04\x95\x10\0\0", "Python pickle, not text"),
        (b"PAR1\x15\x04", "parquet file, not text"),
        (b"ARROW1\0\0", "arrow file, not text"),
        (b"name".ljust(257, b"\0") + b"ustar\x0000", "tar archive, not text"),
        (b"Obj\x01\x04", "Avro file, not text"),
        (b"ORC\n\x0b\x05", "ORC file, not text"),
        (b"\0\0\0\x18ftypmp42", "audio or video, not text"),
        (b"7z\xbc\xaf\x27\x1c\0\4", "7-zip archive, not text"),
        (b"\1\2\3\0\5", "binary of an unknown kind, not text (begins with 01 02 03 00 05)"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer, the file itself"),
    ],
)
def test_a_file_that_is_no_text_is_named_for_what_it_is(tmp_path, data, reason):
    (found,) = read(write(tmp_path / "a", data))
    assert found.startswith(reason)
    (found,) = read(write(tmp_path / "a.html", data))
    assert found.startswith(reason.split(",")[0]) or "not UTF-8" in reason


@pytest.mark.parametrize(
    "text",
    [
        *("PK is a region.", "BZh", "MZ.", "ID3 tags", "Rar!", "ORC\n\u00e9", "ORC is", "!<arch>"),
    ],
)
def test_words_that_begin_as_binary_files_do_are_text(tmp_path, text):
    assert read(write(tmp_path / "a", text)) == [text]


@pytest.mark.parametrize(
    "form",
    [
        '{{"id": 1, "text": "{0}"}}\n{{"id": 2, "text": "b"}}\n',
        '[{{"text": "{0}"}}]',
        '{{\n "text": "{0}"\n}}\n',
        '{{"body": "{0}"}}\n{{"body": "b"}}\n',
    ],
)
@pytest.mark.parametrize("name", ["part-00000", "dump.txt", "dump.jsonl.bak", "dump.gz"])
def test_records_under_the_name_of_a_text_are_told_and_read_or_kept_on_demand(tmp_path, name, form):
    text = form.format("a" * 20_000)
    path = write(tmp_path / name, text)
    (reason,) = read(path)
    assert reason == (
        "a text that holds JSON: --format json reads it, --format text takes it as it is"
    )
    assert read(path, file_format="text") == [text]
    assert read(path, "body" if "body" in form else "text", file_format="json")[0] == "a" * 20_000


@pytest.mark.parametrize(
    "text", ['{"cells": [], "nbformat": 4}', "[section]\nkey = 1\n", "{ int x; }", "[a](b) [c](d)"]
)
def test_braces_and_brackets_alone_make_no_records(tmp_path, text):
    assert read(write(tmp_path / "a.txt", text)) == [text]


def test_a_text_that_begins_with_many_comments_is_looked_at_in_no_time(tmp_path):
    text = "<!-- a --> " * 500 + "<p>"
    assert read(write(tmp_path / "a.md", text)) == [text]


@pytest.mark.parametrize(
    "begin", ["<!DOCTYPE html>\n", "<HTML>", '<?xml version="1.0"?>\n<!-- a -->\n<html>']
)
def test_a_page_under_another_name_is_told_and_read_or_kept_on_demand(tmp_path, begin):
    path = write(tmp_path / "index.php?id=1", begin + PAGE.format("x"))
    (reason,) = read(path)
    assert reason.startswith("a text that holds HTML: --format html reads it, --format text takes")
    assert read(path, file_format="html") == ["Größer x"]
    assert read(path, file_format="text") == [begin + PAGE.format("x")]


def test_a_text_cut_short_by_compression_is_rejected_whole(tmp_path):
    (reason,) = read(write(tmp_path / "a.gz", gzip.compress(b"a whole document")[:-4]))
    assert "cut short" in reason


def test_a_text_too_long_for_memory_is_rejected_and_told_how_it_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_DOCUMENT_BYTES", 1 << 20)
    path = write(tmp_path / "a.txt", b"x\n" * (1 << 20))
    (reason,) = read(path)
    assert "with --split-on" in reason
    assert len(records(path, split_on="64kB")) == 33


# splitting

PLAY = (
    "First Citizen:\nBefore we proceed,\nhear me.\n\n \nAll:\nSpeak, größer.\n\n\n\nFirst:\nYou.\n"
)


@pytest.mark.parametrize(
    ("split_on", "text", "expected"),
    [
        ("<|endoftext|>", "a\n<|endoftext|>\nb\n\nc<|endoftext|>", ["a", "b\n\nc"]),
        ("<|endoftext|>", "<|endoftext|><|endoftext|>a", ["a"]),
        ("blank-lines", "\n\n" + PLAY, [
            "First Citizen:\nBefore we proceed,\nhear me.", "All:\nSpeak, größer.", "First:\nYou.",
        ]),
        (r"\n---\n", "a\n---\nb --- c\n---\n", ["a", "b --- c"]),
        ("aa", "aaab", ["ab"]),
        ("é", "1é2é3", ["1", "2", "3"]),
        ("no such", PLAY, [PLAY.strip("\n")]),
    ],
)  # fmt: skip
def test_a_text_is_cut_where_it_is_asked_to_be(tmp_path, split_on, text, expected):
    path = write(tmp_path / "a.txt", text)
    assert read(path, split_on=split_on) == expected
    data = gzip.compress(text.encode())
    assert read(write(tmp_path / "a.txt.gz", data), split_on=split_on) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("separator", [b"\n", b"<|end|>", b"aab", "漢".encode()])
def test_where_blocks_end_changes_no_piece(size, separator):
    data = b"aaab\n<|end<|end|>" + "漢字aab".encode() + b"\n\n<|end|>aaaab."
    blocks = (data[start : start + size] for start in range(0, len(data), size))
    pieces = list(streams.cut_at(blocks, separator))
    assert separator.join(pieces) == data
    assert len(pieces) == data.count(separator) + 1


def test_kilobytes_are_cut_at_line_ends_and_nothing_is_lost(tmp_path):
    lines = [f"line {i}: " + "x" * (i * 37 % 200) for i in range(5000)]
    path = write(tmp_path / "a.txt", "\n".join(lines) + "\n")
    for size, length in [("4kB", 4000), ("4KiB", 4096), ("4k", 4000), ("1 MB", 10**6)]:
        found = read(path, split_on=size)
        assert "\n".join(found) == "\n".join(lines)
        assert max(map(len, found)) <= length
        assert all(len(text) > length - 250 for text in found[:-1])
    assert read(write(tmp_path / "b.txt", "x" * 9000), split_on="4kB") == ["x" * 9000]


def test_a_bad_byte_and_a_piece_too_long_cost_their_own_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_DOCUMENT_BYTES", 100_000)
    data = b"one\n\ncaf\xe9\n\n" + b"long line\n" * 50_000 + b"\n\ntwo\n"
    path = write(tmp_path / "a.txt", data)
    one, bad, long, two = read(path, split_on="blank-lines")
    assert (one, two) == ("one", "two")
    assert bad.startswith("not UTF-8")
    assert long.startswith("longer than")
    assert [text[:10] for text in read(path, split_on="\\n\\n")] == [
        "one", "not UTF-8:", "longer tha", "two",
    ]  # fmt: skip


@pytest.mark.parametrize("split_on", ["", "0kB", "1000 MB"])
def test_a_size_that_no_document_can_have_is_refused(split_on):
    with pytest.raises(
        ValueError, match="--split-on .*: give a text, blank-lines, or a size up to"
    ):
        texts.split_bytes(split_on)


def test_splitting_holds_no_more_than_a_piece(tmp_path):
    """In a process of its own, which sees how much memory it took at most."""
    path = tmp_path / "a.txt"
    with open(path, "wb") as file:
        for _ in range(20):
            file.write(b"a line of text\n" * 70_000)
    script = (
        "import resource, sys, read_documents as r; from stablelm_jax.preparation import readers;"
        "from stablelm_jax.preparation.formats import Reading;"
        "from stablelm_jax.preparation.inputs import find_files;"
        "file, = find_files([sys.argv[1]]); peak = lambda: resource.getrusage(0).ru_maxrss;"
        "before = peak(); reading = Reading(split_on='1MB');"
        "n = sum(isinstance(t, str) for t in readers.read_file(file, reading));"
        "print(n, (peak() - before) // 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, cwd="tests"
    )
    count, grown = map(int, done.stdout.split())
    assert count == 22
    assert grown < 25


# HTML


@pytest.mark.parametrize("name", ["a.html", "a.HTM", "a.xhtml", "a.html.gz"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "latin-1"])
def test_a_page_gives_its_text_and_with_format_text_its_source(tmp_path, name, encoding):
    pytest.importorskip("resiliparse")
    page = PAGE.format("ist schöner als größer, und für mich genügt es überhaupt nicht. " * 20)
    data = page.encode(encoding)
    path = write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    (text,) = read(path)
    assert text.startswith("Größer ist schöner")
    if encoding == "utf-8":
        assert read(path, file_format="text") == [page]


def test_a_page_without_text_and_a_deep_one_end_nothing(tmp_path):
    pytest.importorskip("resiliparse")
    assert read(write(tmp_path / "a.html", "<p> </p>")) == ["empty document"]
    assert read(write(tmp_path / "a.html", "<div>" * 30_000 + "deep")) == ["deep"]


def test_where_the_extra_is_missing_it_is_named_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    path = write(tmp_path / "a.html", "<p>one</p>")
    with pytest.raises(
        InputError, match=r"a.html: html needs resiliparse: .*\[html\].*--format text"
    ):
        find_files([path])
    assert read(path, file_format="text") == ["<p>one</p>"]
    (tmp_path / "a.html").rename(tmp_path / "page")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "page", "a.html")
    (reason,) = read(tmp_path / "a.zip")
    assert "[html]" in reason
