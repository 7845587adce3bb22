"""Files of every kind, wherever they lie: what cannot be read ends nothing, a failing disk does."""

import bz2
import contextlib
import csv
import errno
import functools
import gzip
import http.server
import io
import json
import threading
import zipfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from read_documents import json_lines, random_texts, read, records, write

from stablelm_jax.preparation import chunks, formats, readers, streams
from stablelm_jax.preparation.formats import kind_of
from stablelm_jax.preparation.inputs import find_files


@pytest.mark.parametrize(
    ("name", "kind", "compression"),
    [
        ("a.jsonl", "jsonl", None),
        ("A.NDJSON.ZST", "jsonl", "zstd"),
        ("a.json.lz4", "json", "lz4"),
        ("a.tar.gz", "tar", "gzip"),
        ("a.b.tgz", "tar", "gzip"),
        ("a.warc.gz", "warc", "gzip"),
        ("a.feather", "arrow", None),
        ("a.htm.bz2", "html", "bzip2"),
        ("a.tsv.xz", "tsv", "xz"),
        ("a.gz", "text", "gzip"),
        (".gz", "text", None),
        ("README", "text", None),
        ("a.py", "text", None),
    ],
)
def test_a_name_tells_the_kind_and_the_compression(name, kind, compression):
    assert kind_of(name) == (kind, compression)
    is_archive = kind in formats.ARCHIVES
    assert kind_of(name, "text") == (kind if is_archive else "text", compression)


def parquet_bytes(texts) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), sink)
    return sink.getvalue()


def zip_bytes(name, data) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr(name, data)
    return sink.getvalue()


def test_every_format_is_read_from_an_fsspec_url(tmp_path):
    texts = random_texts(30)
    for name, data in [
        ("a.jsonl", json_lines(texts)),
        ("a.json", json.dumps([{"text": text} for text in texts]).encode()),
        ("a.jsonl.gz", gzip.compress(json_lines(texts))),
        ("a.jsonl.bz2", bz2.compress(json_lines(texts))),
        ("a.parquet", parquet_bytes(texts)),
        ("a.zip", zip_bytes("a.jsonl", json_lines(texts))),
        ("b.zip", zip_bytes("a.parquet", parquet_bytes(texts))),
    ]:
        fsspec.filesystem("memory").pipe(f"/readers/{name}", data)
        assert records(f"memory://readers/{name}") == texts
    assert records("memory://readers/a.jsonl", part=(0, 10)) == texts[:1]


def test_what_is_read_in_parts_comes_whole_from_a_server_that_gives_no_parts(tmp_path, monkeypatch):
    texts = [str(number) * 1000 for number in range(2000)]  # more than fsspec reads ahead
    table = pa.table({"text": texts})
    pq.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number, text in enumerate(texts):
            archive.writestr(f"{number}.txt", text)
    handler = functools.partial(QuietHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("a.parquet", "a.zip"):
            url = f"http://127.0.0.1:{server.server_port}/{name}"
            assert read(url) == texts
            assert len(chunks.cut(find_files([url]))) == 1
            with monkeypatch.context() as patched:
                patched.setattr(streams, "MAX_DOCUMENT_BYTES", 1 << 20)
                (reason,) = read(url)
                assert reason.endswith("a server that gives whole files: download it first")
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Knows nothing of byte ranges."""

    def log_message(self, *_):
        pass

    def copyfile(self, source, target):
        with contextlib.suppress(ConnectionError):  # who asked has gone
            super().copyfile(source, target)


def test_a_file_without_permission_is_rejected_by_name(tmp_path, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(streams, "open_input", refuse)
    for name in ("a.jsonl", "a.parquet", "a.txt", "a.tar"):
        assert read(write(tmp_path / name, b"x")) == ["no permission to read it"]


@pytest.mark.parametrize(
    "error", [RecursionError(), KeyError("a"), csv.Error(), OSError("odd"), Exception("x")]
)
def test_what_nobody_thought_of_in_a_file_is_a_rejected_record(tmp_path, monkeypatch, error):
    def odd(blocks, reading):
        yield "one"
        raise error

    monkeypatch.setitem(readers._STREAMED, "text", odd)
    one, reason = read(write(tmp_path / "a.txt", b"x"))
    assert one == "one"
    name = type(error).__name__
    assert reason.startswith(f"damaged text, the rest of the file is lost: {name}")


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "the disk"), TimeoutError("the network"), ConnectionError("cut")]
)
def test_a_disk_or_network_that_fails_raises_and_rejects_nothing(tmp_path, monkeypatch, error):
    class Failing(io.BytesIO):
        def read(self, size=-1):
            if self.tell():
                raise error
            return super().read(min(size, 1000) if size > 0 else 1000)

    lines = json_lines(random_texts(2000))
    for name, content in [
        ("a.jsonl", lines),
        ("a.jsonl.gz", gzip.compress(lines)),
        ("a.jsonl.bz2", bz2.compress(lines)),
        ("a.json", b"[" + lines),
        ("a.txt", lines),
        ("a.csv", lines),
        ("a.parquet", parquet_bytes(random_texts(2000))),
        ("a.zip", zip_bytes("a.txt", lines)),
    ]:
        path = write(tmp_path / name, content)
        monkeypatch.setattr(streams, "open_input", lambda path, data=content, **_: Failing(data))
        with pytest.raises(type(error)):
            read(path)
