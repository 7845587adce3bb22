"""Compressed inputs: read whatever their name says, and damage costs no more than it must."""

import bz2
import gzip
import lzma
import random

import lz4.frame
import pytest
import zstandard
from read_documents import json_lines, random_texts, read, records, write

from stablelm_jax.preparation import streams


def zstd(data: bytes, **options) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


COMPRESS = {
    ".gz": gzip.compress,
    ".zst": zstd,
    ".zstd": zstd,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".lz4": lz4.frame.compress,
}
NAMES = dict(zip(COMPRESS, ("gzip", "zstd", "zstd", "xz", "bzip2", "lz4")))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_one_and_several_compressed_frames_are_read_to_the_end(tmp_path, suffix):
    texts = random_texts(3000)
    compress = COMPRESS[suffix]
    frames = compress(json_lines(texts[:1000])) + compress(b"") + compress(json_lines(texts[1000:]))
    for data in (compress(json_lines(texts)), frames):
        meter = streams.Meter()
        path = write(tmp_path / f"a.jsonl{suffix}", data)
        assert records(path, meter=meter) == texts
        assert meter.consumed == len(data)
        # As any other kind of file, and where the name does not tell or lies.
        assert read(write(tmp_path / "a.txt", compress(b"one text"))) == ["one text"]
        other = ".gz" if suffix != ".gz" else ".xz"
        assert records(write(tmp_path / f"a.jsonl{other}", data)) == texts
        assert records(write(tmp_path / "b.jsonl", data)) == texts


def test_gzip_padded_with_zeros_and_zstd_of_a_long_window_are_read(tmp_path):
    texts = random_texts(50)
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(json_lines(texts)) + bytes(10_000))
    assert records(path) == texts
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = compressor.compress(json_lines(texts)) + compressor.flush()
    skipped = b"\x50\x2a\x4d\x18\x03\0\0\0abc"
    assert records(write(tmp_path / "a.jsonl.zst", skipped + data)) == texts


def test_compression_within_compression_is_read(tmp_path):
    data = gzip.compress(bz2.compress(gzip.compress(json_lines(["one"]))))
    assert read(write(tmp_path / "a.jsonl.gz", data)) == ["one"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_stream_cut_short_gives_what_is_readable_and_one_rejected_record(tmp_path, suffix):
    texts = random_texts(10_000)
    data = COMPRESS[suffix](json_lines(texts))
    # What the decoder may have in hand: a block of zstd holds 128 KiB, of gzip and lz4 no more, of
    # xz little; of bzip2 900 kB, here all.
    block = len(json_lines(texts)) if suffix == ".bz2" else 128 << 10
    held = block // (len(json_lines(texts)) // len(texts)) + 200
    for cut in [len(data) - 1, *random.Random(1).sample(range(20, len(data)), 5)]:
        *kept, last = read(write(tmp_path / f"a.jsonl{suffix}", data[:cut]))
        assert kept == texts[: len(kept)]
        assert last == f"{NAMES[suffix]} stream cut short, the rest of the file is lost"
        assert len(kept) >= len(texts) * cut / len(data) - held


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_stream_damaged_in_the_middle_gives_what_lies_before(tmp_path, suffix):
    texts = random_texts(10_000)
    data = bytearray(COMPRESS[suffix](json_lines(texts)))
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(200)
    *kept, last = read(write(tmp_path / f"a.jsonl{suffix}", bytes(data)))
    assert last.startswith(f"{NAMES[suffix]} stream damaged, the rest of the file is lost")
    if suffix != ".bz2":
        before = len(texts) * 2 // 5
        assert kept[:before] == texts[:before]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_name_that_lies_about_compression_is_seen_through(tmp_path, suffix):
    path = write(tmp_path / f"a.jsonl{suffix}", json_lines(["one"]))
    assert read(path) == ["one"]
    (reason,) = read(write(tmp_path / f"b.jsonl{suffix}", bytes(100)))
    assert reason.startswith(f"{NAMES[suffix]} stream damaged")


@pytest.mark.parametrize("layers", [1, 2])
def test_a_stream_made_to_fill_the_machine_is_left_in_time(tmp_path, monkeypatch, layers):
    monkeypatch.setattr(streams, "_ANY_EXPANSION_BYTES", 1 << 20)
    monkeypatch.setattr(streams, "MAX_DOCUMENT_BYTES", 1 << 30)
    data = b"x" * (200 << 20)
    for _ in range(layers):
        data = zstd(data)
    for name in ("a.txt.zst", "a.jsonl.zst"):
        (reason,) = read(write(tmp_path / name, data))
        assert reason.startswith("grows without measure when decompressed")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-8-sig"])
def test_what_begins_with_a_byte_order_mark_is_decoded_by_it(tmp_path, encoding):
    text = "größer 漢字🙂 " * 20_000
    mark = "\ufeff".encode(encoding) if encoding.endswith("be") else b""
    assert read(write(tmp_path / "a.txt", mark + text.encode(encoding))) == [text]
    data = mark + f'{{"text": "{text}"}}\n{{"text": "b"}}\n'.encode(encoding)
    assert read(write(tmp_path / "a.jsonl", data)) == [text, "b"]
    assert read(write(tmp_path / "a.json.gz", gzip.compress(data))) == [text, "b"]
    data = mark + f'id,text\n1,"{text}"\n'.encode(encoding)
    assert read(write(tmp_path / "a.csv", data)) == [text]


def test_utf16_without_its_mark_or_cut_short_is_named(tmp_path):
    (reason,) = read(write(tmp_path / "a.txt", "plain words".encode("utf-16-le")))
    assert reason == "UTF-16 without a byte order mark, not UTF-8"
    (reason,) = read(write(tmp_path / "a.txt", "words".encode("utf-16")[:-1]))
    assert reason.startswith("not UTF-16 as its byte order mark says")
