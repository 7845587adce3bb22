"""Archives: every file within is read by its own name, and one that cannot be costs no other."""

import bz2
import gzip
import io
import random
import tarfile
import zipfile

import pytest
from read_documents import read, write

from stablelm_jax.preparation import streams

MEMBERS = {
    "./0001.txt": b"a caption",
    "0001.json": b'{"text": "in a record"}',
    "0001.jpg": b"\xff\xd8\xff\xe0\0",
    "0002.json": b'{"width": 5}',
    "part/lines.jsonl.gz": gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'),
    "part/table.csv.bz2": bz2.compress(b"text\nthree\n"),
    "part/inner.zip": b"PK\x05\x06" + bytes(18),
    "part/._0001.txt": b"what a Mac leaves",
    "part/empty.txt": b"",
    "part/latin.txt": b"caf\xe9",
}
EXPECTED = [
    "a caption",
    "in a record",
    "JPEG image, not text (member 0001.jpg)",
    "no key 'text' (keys: width) (--format text takes the file as it is) (member 0002.json)",
    "one",
    "two",
    "three",
    "zip archive in an archive: unpack it first (member part/inner.zip)",
    "hidden in an archive (member part/._0001.txt)",
    "empty document (member part/empty.txt)",
    "not UTF-8: 0xe9 at byte 3 (member part/latin.txt)",
]


def tar(members, mode="w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zipped(members, **options) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.tar", tar(MEMBERS)),
        ("a.tar.gz", tar(MEMBERS, "w:gz")),
        ("a.tgz", tar(MEMBERS, "w:gz")),
        ("a.tar.xz", tar(MEMBERS, "w:xz")),
        ("a.tbz2", tar(MEMBERS, "w:bz2")),
        ("a.zip", zipped(MEMBERS)),
    ],
)
def test_each_file_of_an_archive_is_read_by_its_own_name(tmp_path, name, data):
    assert read(write(tmp_path / name, data)) == EXPECTED


def test_the_key_the_format_and_the_split_hold_within_an_archive(tmp_path):
    members = {"a.json": b'{"meta": {"body": "x"}}', "b.txt": b"one\n\ntwo\n"}
    path = write(tmp_path / "a.zip", zipped(members))
    assert read(path, "meta.body", split_on="blank-lines") == ["x", "one", "two"]
    assert read(path, file_format="text") == ['{"meta": {"body": "x"}}', "one\n\ntwo\n"]


def test_links_in_a_tar_are_told_and_folders_are_not(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("text")
    (tmp_path / "in" / "link.txt").symlink_to("a.txt")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "in", "in")
    found = read(tmp_path / "a.tar")
    assert sorted(found) == ["a link or device in an archive (member in/link.txt)", "text"]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip"])
def test_an_archive_cut_short_keeps_what_lies_before_and_says_so(tmp_path, name):
    members = {f"{i}.txt": f"text {i * i} ".encode() * 200 for i in range(400)}
    data = zipped(members) if name == "a.zip" else tar(members, "w:gz" if "gz" in name else "w")
    texts = [member.decode() for member in members.values()]
    # Also where a member of the tar ends: nothing is missing there but what follows.
    for cut in [
        len(data) // 2,
        512 * 20,
        *random.Random(4).sample(range(600, len(data) - 1100), 4),
    ]:
        if cut < len(data) - 1100:
            *kept, reason = read(write(tmp_path / name, data[:cut]))
            assert kept == texts[: len(kept)]
            assert "cut short" in reason or "damaged" in reason


def test_a_member_that_is_damaged_encrypted_or_of_an_unknown_method_costs_no_other(tmp_path):
    members = {"a.txt": b"first " * 50, "b.txt": b"second " * 50, "c.txt": b"third " * 50}
    data = bytearray(zipped(members))
    place = data.index(b"b.txt") + 5
    data[place : place + 10] = bytes(10)
    first, damaged, last = read(write(tmp_path / "a.zip", bytes(data)))
    assert (first, last) == ("first " * 50, "third " * 50)
    assert damaged.startswith("damaged in its archive")
    assert damaged.endswith("(member b.txt)")
    data = bytearray(zipped({"a.txt": b"secret"}))
    for header, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(header) + place] |= 1  # the flag of an encrypted member
    (reason,) = read(write(tmp_path / "a.zip", bytes(data)))
    assert "encrypted" in reason


def test_an_archive_made_to_fill_the_machine_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "_ANY_EXPANSION_BYTES", 1 << 20)
    data = zipped({"a.txt": bytes(40 << 20)})
    (reason,) = read(write(tmp_path / "a.zip", data))
    assert reason == "grows without measure when decompressed, the rest of the file is lost"
    data = bz2.compress(tar({"a.txt": b"x", "b.txt": bytes(40 << 20), "c.txt": b"y"}))
    *_, reason = read(write(tmp_path / "a.tar.bz2", data))
    assert reason.startswith("grows without measure")


def test_what_is_no_archive_is_named(tmp_path):
    assert read(write(tmp_path / "a.zip", b"%PDF-1.4")) == ["PDF, not zip"]
    assert read(write(tmp_path / "a.tar", b"\x89PNG\r\n" + bytes(2000))) == ["PNG image, not tar"]
    (reason,) = read(write(tmp_path / "a.zip", zipped(MEMBERS)[:-30]))
    assert reason.startswith("zip archive damaged or without its ending")
    for name in ("a.zip", "a.tar", "a.warc"):
        (reason,) = read(write(tmp_path / name, b"<html>no archive" * 100))
        assert "damaged" in reason


# WARC


def record(kind, content_type, payload, uri="http://a.example/x", http=None) -> bytes:
    if http:
        payload = f"HTTP/1.1 {http}\r\nContent-Type: {content_type}\r\n\r\n".encode() + payload
        content_type = "application/http; msgtype=response"
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {uri}\r\n"
        f"WARC-Date: 2020-01-01T00:00:00Z\r\nContent-Type: {content_type}\r\n"
        f"WARC-Record-ID: <urn:uuid:12345678-1234-1234-1234-123456789012>\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload + b"\r\n\r\n"


PAGES = [
    record("warcinfo", "application/warc-fields", b"software: test\r\n"),
    record("response", "text/html; charset=utf-8", b"<p>one</p>", http="200 OK"),
    record("response", "image/png", b"\x89PNG\r\n", http="200 OK", uri="http://a.example/i"),
    record("response", "text/html", b"<p>gone</p>", http="404 Not Found"),
    record("conversion", "text/plain", "größer".encode()),
    record("response", "text/plain", b"two", http="200 OK"),
]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz", "a.warc.wet.gz", "a.warc.zst"])
def test_the_pages_of_a_web_archive_are_read(tmp_path, name):
    pytest.importorskip("warcio")
    pytest.importorskip("resiliparse")
    data = b"".join(map(gzip.compress, PAGES)) if name.endswith("gz") else b"".join(PAGES)
    path = write(tmp_path / name, data)
    assert read(path) == [
        "one", "a page of image/png, not text (http://a.example/i)",
        "a page of HTTP status 404 (http://a.example/x)", "größer", "two",
    ]  # fmt: skip


def test_a_web_archive_that_is_cut_keeps_what_lies_before(tmp_path):
    pytest.importorskip("warcio")
    data = b"".join(map(gzip.compress, PAGES))
    *kept, reason = read(write(tmp_path / "a.warc.gz", data[: -len(gzip.compress(PAGES[-1])) // 2]))
    assert kept[0] == "one"
    assert "cut short" in reason
    plain = b"".join(PAGES)
    *kept, reason = read(write(tmp_path / "a.warc", plain[:-6]))
    assert kept[0] == "one"
    assert "cut short" in reason
