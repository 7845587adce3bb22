"""Readers: every record is a document or a reason, and damage costs no more than it must."""

import errno
import gzip
import io
import itertools
import json
import random

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from stablelm_jax.preparation import readers
from stablelm_jax.preparation.readers import Rejected


def write(path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def jsonl(texts) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def texts_and_reasons(records):
    return [record if isinstance(record, str) else record.reason for record in records]


def random_texts(count, seed=0):
    source = random.Random(seed)
    letters = 'abcdefgh \n\t"\\äöü漢字🙂'
    return ["".join(source.choices(letters, k=source.randint(1, 80))) + "x" for _ in range(count)]


# jsonl


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut of', "not JSON"),
        (b'{"text": "caf\xe9"}', "not UTF-8: 0xe9 at byte 13"),
        (b'{"text": ""}', "empty document"),
        (b'{"text": " \\n\\t"}', "empty document"),
        (b"", "empty line"),
        (b"  \r", "empty line"),
        (b'{"body": "a", "id": 1}', "no key 'text' (keys: body, id)"),
        (b"{}", "no key 'text' (keys: none)"),
        (b'{"text": 7}', "'text' is a JSON number, not a string"),
        (b'{"text": null}', "'text' is a JSON null, not a string"),
        (b'{"text": ["a"]}', "'text' is a JSON array, not a string"),
        (b'["a"]', "a JSON array, not an object"),
        (b'"a"', "a JSON string, not an object"),
        (b"true", "a JSON boolean, not an object"),
        (b'{"text": "\\ud800"}', "not Unicode: an unpaired surrogate"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "a"} {"text": "b"}', "not JSON"),
        (b"\x00\xff\xfe", "not UTF-8"),
    ],
)
def test_a_bad_line_is_rejected_with_its_reason_and_costs_no_other_line(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", jsonl(["one"]) + line + b"\n" + jsonl(["two"]))
    first, rejected, last = readers.read_jsonl(path, "text")
    assert (first, last) == ("one", "two")
    assert rejected.reason.startswith(reason)


def test_what_python_and_windows_write_is_read(tmp_path):
    data = (
        b'\xef\xbb\xbf{"text": "after a byte order mark"}\r\n'
        b'{"score": NaN, "most": Infinity, "text": "not quite JSON"}\n'
        b'{"n": 123456789012345678901234567890, "text": "a large number"}\n'
        b'{"text": "no newline at the end"}'
    )
    assert list(readers.read_jsonl(write(tmp_path / 'a.jsonl', data), 'text')) == [
        'after a byte order mark', 'not quite JSON', 'a large number', 'no newline at the end',
    ]  # fmt: skip


def test_texts_come_back_as_they_were_written(tmp_path):
    texts = random_texts(500)
    path = write(tmp_path / "a.jsonl", jsonl(texts))
    assert list(readers.read_jsonl(path, "text")) == texts


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([b"", b'{"text":"a"}', b'{"text":"bb\\n"}', b"oops", b"\r"])),
    st.booleans(),
    st.lists(st.integers(0, 100)),
)
def test_ranges_give_every_line_once_wherever_they_are_cut(tmp_path_factory, lines, ends, cuts):
    data = b"\n".join(lines) + (b"\n" if ends else b"")
    path = write(tmp_path_factory.getbasetemp() / "ranges.jsonl", data)
    whole = list(readers.read_jsonl(path, "text"))
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [
        list(readers.read_jsonl(path, "text", None, start, end))
        for start, end in itertools.pairwise(edges)
    ]
    assert [record for piece in pieces for record in piece] == whole
    assert len(whole) == data.count(b"\n") + (not data.endswith(b"\n") and data != b"")


def test_a_range_within_a_long_line_does_not_read_to_its_end(tmp_path):
    path = write(tmp_path / "a.jsonl", b"x" * 5_000_000 + b"\n" + jsonl(["end"]))

    class Counting(io.FileIO):
        total = 0

        def read(self, size=-1):
            data = super().read(size)
            Counting.total += len(data)
            return data

    with Counting(path) as file:
        begin, _ = readers.line_range(file, 1_000_000, 1_100_000)
    assert begin >= 1_100_000
    assert Counting.total < 300_000


def test_a_line_too_long_for_memory_is_one_rejected_record(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 3_000_000)
    long_line = b'{"text": "' + b"x" * 5_000_000 + b'"}\n'
    path = write(tmp_path / "a.jsonl", jsonl(["one"]) + long_line + jsonl(["two"]))
    first, rejected, last = readers.read_jsonl(path, "text")
    assert (first, last) == ("one", "two")
    assert "longer than" in rejected.reason
    assert "split it" in rejected.reason


# compressed


def zstd(data: bytes, **options) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


COMPRESS = {"gzip": gzip.compress, "zstd": zstd}


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_one_and_several_compressed_frames_are_read_to_the_end(tmp_path, compression):
    texts = random_texts(3000)
    compress = COMPRESS[compression]
    frames = compress(jsonl(texts[:1000])) + compress(b"") + compress(jsonl(texts[1000:]))
    for data in (compress(jsonl(texts)), frames):
        path = write(tmp_path / "a", data)
        meter = readers.Meter()
        assert list(readers.read_jsonl(path, "text", compression, meter=meter)) == texts
        assert meter.consumed == len(data)


def test_gzip_padded_with_zeros_and_zstd_of_a_long_window_are_read(tmp_path):
    texts = random_texts(50)
    path = write(tmp_path / "a.gz", gzip.compress(jsonl(texts)) + bytes(10_000))
    assert list(readers.read_jsonl(path, "text", "gzip")) == texts
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = write(tmp_path / "a.zst", compressor.compress(jsonl(texts)) + compressor.flush())
    assert list(readers.read_jsonl(path, "text", "zstd")) == texts


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_stream_cut_short_gives_what_is_readable_and_one_rejected_record(tmp_path, compression):
    texts = random_texts(10_000)
    data = COMPRESS[compression](jsonl(texts))
    # What the decoder may have in hand: a block of zstd holds 128 KiB, one of gzip no more.
    held = (128 << 10) // (len(jsonl(texts)) // len(texts)) + 200
    for cut in [1, len(data) - 1, *random.Random(1).sample(range(len(data)), 6)]:
        path = write(tmp_path / "a", data[:cut])
        *kept, last = readers.read_jsonl(path, "text", compression)
        assert kept == texts[: len(kept)]
        assert last.reason == f"{compression} stream cut short, the rest of the file is lost"
        assert len(kept) >= len(texts) * cut / len(data) - held


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_stream_damaged_in_the_middle_gives_what_lies_before(tmp_path, compression):
    texts = random_texts(10_000)
    data = bytearray(COMPRESS[compression](jsonl(texts)))
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(200)
    *kept, last = readers.read_jsonl(write(tmp_path / "a", bytes(data)), "text", compression)
    assert last.reason.startswith(f"{compression} stream damaged, the rest of the file is lost")
    before = len(texts) * 2 // 5
    assert kept[:before] == texts[:before]


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_file_that_is_not_compressed_at_all_is_one_rejected_record(tmp_path, compression):
    (record,) = readers.read_jsonl(write(tmp_path / "a", jsonl(["one"])), "text", compression)
    assert record.reason.startswith(f"{compression} stream damaged")


# parquet


def write_parquet(path, values, kind=None, rows=100, name="text") -> str:
    table = pa.table({"id": list(range(len(values))), name: pa.array(values, kind)})
    pq.write_table(table, path, row_group_size=rows)
    return str(path)


@pytest.mark.parametrize(
    'kind',
    [
        pa.string(), pa.large_string(), pa.string_view(), pa.binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
)  # fmt: skip
def test_parquet_texts_come_back_from_every_kind_of_string_column(tmp_path, kind):
    texts = random_texts(450)
    values = [text.encode() for text in texts] if kind == pa.binary() else texts
    path = write_parquet(tmp_path / "a.parquet", values, kind)
    assert list(readers.read_parquet(path, "text")) == texts
    halves = [readers.read_parquet(path, "text", 0, 2), readers.read_parquet(path, "text", 2, 5)]
    assert [text for half in halves for text in half] == texts


def test_parquet_rows_without_usable_text_are_rejected_one_by_one(tmp_path):
    values = [b"one", None, b"caf\xe9", b"", b"two"]
    path = write_parquet(tmp_path / "a.parquet", values, pa.binary(), rows=2)
    assert texts_and_reasons(readers.read_parquet(path, 'text')) == [
        'one', "'text' is null", 'not UTF-8: 0xe9 at byte 3', 'empty document', 'two',
    ]  # fmt: skip


def test_bytes_that_are_not_utf8_in_a_parquet_string_column_are_rejected(tmp_path):
    values = pa.array([b"one", b"caf\xe9", b"two"], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 3, values.buffers())
    path = write_parquet(tmp_path / "a.parquet", strings)
    assert texts_and_reasons(readers.read_parquet(path, 'text')) == [
        'one', 'not UTF-8: 0xe9 at byte 3', 'two',
    ]  # fmt: skip


def test_a_parquet_column_that_is_missing_or_no_text_rejects_every_row(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [1, 2, 3])
    for key, reason in [
        ("body", "no column 'body' (columns: id, text)"),
        ("text", "column 'text' holds int64, not strings"),
    ]:
        assert list(readers.read_parquet(path, key)) == [Rejected(reason)] * 3


def test_a_damaged_row_group_costs_its_own_rows_only(tmp_path):
    texts = random_texts(1000)
    path = tmp_path / "a.parquet"
    write_parquet(path, texts, rows=200)
    column = pq.ParquetFile(path).metadata.row_group(2).column(1)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = random.Random(2).randbytes(
        column.total_compressed_size
    )
    path.write_bytes(data)
    records = list(readers.read_parquet(str(path), "text"))
    assert len(records) == 1000
    assert records[:400] + records[600:] == texts[:400] + texts[600:]
    assert all(record.reason.startswith("row group 2 damaged") for record in records[400:600])


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no parquet at all, by no means"])
def test_a_file_that_is_no_parquet_is_one_rejected_record(tmp_path, data):
    (record,) = readers.read_parquet(write(tmp_path / "a.parquet", data), "text")
    assert record.reason.startswith("not a readable parquet file")


# text


def test_a_text_file_is_one_document_whatever_its_compression(tmp_path):
    text = "first line\nsecond line: äöü\r\n"
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbf" + text.encode())
    assert list(readers.read_text(path)) == [text]
    for compression, compress in COMPRESS.items():
        path = write(tmp_path / "a", compress(text.encode()))
        assert list(readers.read_text(path, compression)) == [text]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty document"),
        (b"\n \n", "empty document"),
        (b"\x7fELF\x00\x01", "binary, not text"),
        (b"one\ntwo\ncaf\xe9\n", "not UTF-8: 0xe9 on line 3"),
    ],
)
def test_a_file_that_is_no_text_is_rejected_with_its_reason(tmp_path, data, reason):
    assert list(readers.read_text(write(tmp_path / "a", data))) == [Rejected(reason)]


def test_a_document_cut_short_by_compression_is_rejected_whole(tmp_path):
    path = write(tmp_path / "a.gz", gzip.compress(b"a whole document")[:-4])
    (record,) = readers.read_text(path, "gzip")
    assert "cut short" in record.reason


def test_a_text_file_too_long_for_memory_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 1 << 20)
    (record,) = readers.read_text(write(tmp_path / "a.txt", b"x" * (2 << 20)))
    assert "pass --format jsonl" in record.reason


# where files lie


def test_every_format_is_read_from_an_fsspec_url(tmp_path):
    texts = random_texts(30)
    memory = fsspec.filesystem("memory")
    for name, data in [
        ("a.jsonl", jsonl(texts)),
        ("a.jsonl.gz", gzip.compress(jsonl(texts))),
        ("a.txt", texts[0].encode()),
    ]:
        memory.pipe(f"/readers/{name}", data)
    path = write_parquet(tmp_path / "a.parquet", texts)
    memory.put(path, "/readers/a.parquet")
    root = "memory://readers/"
    assert list(readers.read_jsonl(root + "a.jsonl", "text")) == texts
    assert list(readers.read_jsonl(root + "a.jsonl", "text", None, 0, 10)) == texts[:1]
    assert list(readers.read_jsonl(root + "a.jsonl.gz", "text", "gzip")) == texts
    assert list(readers.read_parquet(root + "a.parquet", "text")) == texts
    assert list(readers.read_text(root + "a.txt")) == texts[:1]


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "the disk"), TimeoutError("the network"), ConnectionError("cut")]
)
def test_a_disk_or_network_that_fails_raises_and_rejects_nothing(tmp_path, monkeypatch, error):
    class Failing(io.BytesIO):
        def read(self, size=-1):
            if self.tell():
                raise error
            return super().read(min(size, 1000) if size > 0 else 1000)

    data = jsonl(random_texts(2000))
    write_parquet(tmp_path / "a.parquet", random_texts(2000))
    for content, read in [
        (data, lambda: readers.read_jsonl("", "text")),
        (gzip.compress(data), lambda: readers.read_jsonl("", "text", "gzip")),
        (data, lambda: readers.read_text("")),
        ((tmp_path / "a.parquet").read_bytes(), lambda: readers.read_parquet("", "text")),
    ]:
        monkeypatch.setattr(readers, "open_input", lambda path, data=content, **_: Failing(data))
        with pytest.raises(type(error)):
            list(read())
