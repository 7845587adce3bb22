"""Chunks: which files are read, in which order, and how they are cut into pieces of work."""

import gzip
import itertools
import json
import os
import pathlib

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stablelm_jax.preparation import chunks
from stablelm_jax.preparation.formats import Reading
from stablelm_jax.preparation.inputs import InputError, find_files, fingerprint


@pytest.fixture
def tree(tmp_path):
    for name, data in {
        "b/two.py": b"two = 2\n",
        "a.jsonl": b'{"text": "a"}\n',
        "a/one.md": b"# one\n",
        "a/.hidden": b"hidden",
        ".git/config": b"hidden",
        "a/__pycache__/one.pyc": b"\0",
        "part.jsonl.gz": gzip.compress(b'{"text": "b"}\n'),
        "c.ndjson.zst": b"",
        "settings.json": b'{\n  "text": "one value over several lines"\n}\n',
        "dump.json": b'{"text": "c"}\n{"text": "d"}\n',
        "dump.json.gz": gzip.compress(b'{"text": "e"}\n'),
        "old.PARQUET": b"",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path)
    return tmp_path


def test_a_folder_gives_its_files_sorted_without_what_is_hidden_and_says_what_they_are(tree):
    found = [
        (os.path.relpath(file.path, tree), file.kind, file.compression)
        for file in find_files([str(tree)])
    ]
    assert found == [
        ("a.jsonl", "jsonl", None),
        ("c.ndjson.zst", "jsonl", "zstd"),
        ("dump.json", "json", None),
        ("dump.json.gz", "json", "gzip"),
        ("old.PARQUET", "parquet", None),
        ("part.jsonl.gz", "jsonl", "gzip"),
        ("settings.json", "json", None),
        ("a/one.md", "text", None),
        ("b/two.py", "text", None),
    ]


def test_a_format_that_is_asked_for_holds_for_every_file(tree):
    files = find_files([str(tree / "a"), str(tree / "dump.json.gz")], "text")
    assert [(file.kind, file.compression) for file in files] == [("text", None), ("text", "gzip")]


def test_inputs_keep_the_order_they_are_named_in_and_patterns_are_sorted(tree):
    found = find_files([str(tree / "b"), str(tree / "*.jsonl*")])
    assert [os.path.basename(file.path) for file in found] == ["two.py", "a.jsonl", "part.jsonl.gz"]


def test_urls_give_the_same_files_as_paths(tree):
    for name in ("a.jsonl", "a/one.md", ".git/config", "a/.hidden"):
        fsspec.filesystem("memory").pipe(f"/chunks/{name}", (tree / name).read_bytes())
    found = [file.name for file in find_files(["memory://chunks"])]
    assert found == ["memory:///chunks/a.jsonl", "memory:///chunks/a/one.md"]
    assert [file.name for file in find_files(["memory://chunks/*.jsonl"])] == found[:1]
    (file,) = find_files(["memory://chunks/a.jsonl"])
    assert file.size == 14
    (local,) = find_files([f"file://{tree}/a.jsonl"])
    assert local.size == 14


def test_an_input_that_is_not_there_or_comes_twice_is_refused_by_name(tree):
    for missing in (str(tree / "missing.jsonl"), str(tree / "*.txt"), "memory://chunks/missing"):
        with pytest.raises(InputError, match="nothing there"):
            find_files([missing])
    with pytest.raises(InputError, match=r"one.md is reached twice"):
        find_files([str(tree), str(tree / "a" / "one.md")])
    with pytest.raises(InputError, match="nonsense"):
        find_files(["nonsense://bucket/a.jsonl"])


def test_the_fingerprint_follows_the_files_and_not_the_place(tree):
    def of(folder):
        return fingerprint(find_files([str(folder)]))

    before = of(tree / "a")
    assert before == of(tree / "a")
    (tree / "a").rename(tree / "moved")
    assert of(tree / "moved") == before
    path = tree / "moved" / "one.md"
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    assert of(tree / "moved") != before
    files = find_files([str(tree)])
    assert fingerprint(files[::-1]) != fingerprint(files)


def read(cut):
    return [record for chunk in cut for record in chunks.read_chunk(chunk, Reading())]


def make_inputs(folder: pathlib.Path) -> list[str]:
    texts = [f"document {number}, " * (number % 40 + 1) for number in range(2000)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "plain.jsonl").write_text("".join(lines[:900]))
    (folder / "small.jsonl").write_text("".join(lines[900:920]))
    (folder / "z.jsonl.gz").write_bytes(gzip.compress("".join(lines[920:1200]).encode()))
    table = pa.table({"text": texts[1200:1900]})
    pq.write_table(table, folder / "rows.parquet", row_group_size=70, compression="none")
    for number in range(1900, 2000):
        (folder / f"{number}.txt").write_text(texts[number])
    names = ["plain.jsonl", "small.jsonl", "z.jsonl.gz", "rows.parquet", "*.txt"]
    return texts, [str(folder / name) for name in names]


@pytest.mark.parametrize("size", [2_000, 30_000, 10_000_000])
def test_every_document_is_in_one_chunk_in_order_whatever_the_size_of_chunks(
    tmp_path, monkeypatch, size
):
    texts, inputs = make_inputs(tmp_path)
    monkeypatch.setattr(chunks, "_MIN_CHUNK_BYTES", size)
    monkeypatch.setattr(chunks, "_CHUNKS_PER_SOURCE", 10**9)
    cut = chunks.cut(find_files(inputs))
    assert [record.content for record in read(cut)] == texts
    assert (len(cut) == 1) == (size > 1_000_000)
    assert chunks.chunks_from_json(json.loads(json.dumps(cut))) == cut


def test_small_files_share_a_chunk_and_large_ones_are_cut(tmp_path, monkeypatch):
    _, inputs = make_inputs(tmp_path)
    monkeypatch.setattr(chunks, "_MIN_CHUNK_BYTES", 50_000)
    cut = chunks.cut(find_files(inputs))
    ranges = [chunk for chunk in cut if chunk.files[0].name.endswith("plain.jsonl")]
    assert len(ranges) > 3
    for chunk, following in itertools.pairwise(ranges):
        assert chunk.end == following.start
    assert len(cut[-1].files) == 100


def test_rows_of_a_parquet_range_are_counted_from_the_start_of_the_file(tmp_path, monkeypatch):
    make_inputs(tmp_path)
    monkeypatch.setattr(chunks, "_MIN_CHUNK_BYTES", 50_000)
    monkeypatch.setattr(chunks, "_CHUNKS_PER_SOURCE", 10**9)
    cut = chunks.cut(find_files([str(tmp_path / "rows.parquet")]))
    assert len(cut) > 2
    assert [record.line for record in read(cut)] == list(range(1, 701))


def test_reading_can_start_behind_any_number_of_records(tmp_path):
    texts, inputs = make_inputs(tmp_path)
    (chunk,) = chunks.cut(find_files(inputs))
    for skip in (0, 1, 900, 901, 1234, 1999, 2000):
        records = list(chunks.read_chunk(chunk, Reading(), skip))
        assert [record.content for record in records] == texts[skip:]
    assert records == []


def test_what_save_to_disk_writes_beside_its_rows_is_left_out_by_name(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        table = pa.table({"text": ["a row"]})
        with pa.ipc.new_stream(str(tmp_path / split / "data-0.arrow"), table.schema) as writer:
            writer.write_table(table)
        (tmp_path / split / "state.json").write_text("{}")
        (tmp_path / split / "dataset_info.json").write_text('{"text": "of the data set"}')
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "state.json").write_text('{"text": "no data set here"}')
    left_out = []
    found = find_files([str(tmp_path)], left_out=left_out)
    names = [os.path.relpath(file.path, tmp_path) for file in found]
    assert names == ["other/state.json", "test/data-0.arrow", "train/data-0.arrow"]
    assert [item.reason for item in left_out] == ["metadata of a data set"] * 5
