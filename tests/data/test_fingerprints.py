"""File fingerprints: a shard changed under a run is named, one that was only touched passes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import fsspec
import pytest
from prepared import EOD, write_source

from stablelm_jax.data import fingerprints, manifest
from stablelm_jax.data.fingerprints import FileFingerprints
from stablelm_jax.data.manifest import open_sources
from stablelm_jax.data.shards import ShardError

NAMES = ("books", "code")
DOCUMENTS = [[8, 9, 10, EOD], [11, EOD], [12, 13, EOD]]
FILES = [
    f"{name}/{shard}.{suffix}"
    for name in NAMES
    for shard in ("train-00000", "train-00001", "held_out-00000")
    for suffix in ("bin", "idx")
]


@pytest.fixture
def root(tmp_path):
    for name in NAMES:
        write_source(tmp_path / "data", name, [DOCUMENTS, DOCUMENTS[:2]])
    return tmp_path / "data"


@pytest.fixture
def sources(root):
    return open_sources(root, NAMES)


def later(path: Path) -> None:
    """Moves the time of a file by the smallest step; the clock of a disk may be a coarse one."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    later(path)


@pytest.fixture
def record(tmp_path) -> Path:
    return tmp_path / "shards.json"


def check(sources, record) -> list[str]:
    """A start of a run; returns what it told."""
    told = []
    FileFingerprints(record, sources, told.append).check()
    return told


def refused(sources, record) -> str:
    before = record.read_text()
    with pytest.raises(ShardError, match="changed since this run began") as caught:
        check(sources, record)
    assert record.read_text() == before
    message = str(caught.value)
    assert "Restore" in message and "start another run" in message
    return message


def test_fingerprints_are_size_and_time_of_both_files_of_every_shard(root, sources, record):
    assert check(sources, record) == []
    taken = json.loads(record.read_text())
    assert sorted(taken) == sorted(FILES)
    for key, fingerprint in taken.items():
        status = (root / key).stat()
        assert fingerprint == [status.st_size, status.st_mtime_ns]


def test_shards_that_nobody_touched_pass_unread(sources, record, monkeypatch):
    check(sources, record)

    def read(path, info):
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(fingerprints, "check_shard", read)
    assert check(sources, record) == []


def test_touched_shards_pass_and_are_recorded_anew(root, sources, record):
    check(sources, record)
    before = record.read_text()
    later(root / "books/train-00000.bin")
    later(root / "code/train-00001.idx")
    told = [line.split(":")[0] for line in check(sources, record)]
    assert told == [str(root / "books/train-00000.bin"), str(root / "code/train-00001.bin")]
    assert record.read_text() != before
    assert check(sources, record) == []


def test_a_copy_of_the_data_in_another_place_passes(root, sources, record, tmp_path):
    check(sources, record)
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    copy = open_sources(tmp_path / "copy", NAMES)
    assert len(check(copy, record)) == len(FILES) / 2
    assert check(copy, record) == []


def test_a_change_between_two_checks_of_one_start_is_refused(root, sources, record):
    watched = FileFingerprints(record, sources, print)
    watched.check()
    flip(root / "code/train-00001.bin", 3)
    with pytest.raises(ShardError, match="changed since this run began"):
        watched.check()


def test_spans_are_watched_like_the_shards_they_belong_to(tmp_path, record):
    def spans(document):
        return [(0, len(document))]

    write_source(tmp_path, "chats", [DOCUMENTS], kind="conversations", spans=spans)
    sources, sidecar = open_sources(tmp_path, ["chats"]), tmp_path / "chats/train-00000.spans.npy"
    assert check(sources, record) == []
    later(sidecar)
    assert len(check(sources, record)) == 1
    flip(sidecar, -1)
    assert str(sidecar) in refused(sources, record)


def test_a_broken_record_is_told_and_written_anew(sources, record):
    check(sources, record)
    whole = record.read_text()
    record.write_text(whole[:20])
    assert "is broken" in check(sources, record)[0]
    assert record.read_text() == whole


@pytest.mark.parametrize("key", [key for key in FILES if key.endswith(".bin")])
def test_one_flipped_bit_under_the_same_size_is_refused_and_named(root, sources, record, key):
    check(sources, record)
    flip(root / key, 3)
    message = refused(sources, record)
    assert str(root / key) in message and "sha256" in message
    assert all(str(root / other) not in message for other in FILES if other != key)


def test_every_changed_file_is_named_not_only_the_first(root, sources, record):
    check(sources, record)
    changed = ("books/train-00001.bin", "code/held_out-00000.bin")
    for key in changed:
        flip(root / key, 0)
    message = refused(sources, record)
    assert [key for key in FILES if str(root / key) in message] == list(changed)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_file_cut_short_is_refused_and_named(root, sources, record, suffix):
    check(sources, record)
    path = root / f"code/train-00000.{suffix}"
    os.truncate(path, path.stat().st_size - 4)
    assert str(path) in refused(sources, record)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_file_that_is_gone_is_refused_and_named(root, sources, record, suffix):
    check(sources, record)
    path = root / f"books/held_out-00000.{suffix}"
    path.unlink()
    assert f"{path}: No such file" in refused(sources, record)


def test_an_index_that_contradicts_itself_is_refused_and_named(root, sources, record):
    check(sources, record)
    path = root / "books/train-00000.idx"
    flip(path, 34)  # the length of the first document
    assert f"{path}: sequences do not lie one after the other" in refused(sources, record)


def test_shards_prepared_anew_in_the_same_place_are_refused(root, sources, record, tmp_path):
    """Index and tokens fit each other, but they are not those of the manifest that was read."""
    check(sources, record)
    fewer = write_source(tmp_path / "other", "books", [DOCUMENTS[1:], DOCUMENTS[:2]])
    for suffix in ("bin", "idx"):
        name = f"train-00000.{suffix}"
        shutil.copyfile(fewer.directory / name, root / "books" / name)
    message = refused(sources, record)
    assert "20 bytes where the manifest says 36" in message and "train-00001" not in message


def test_a_source_that_was_not_recorded_passes(root, sources, record):
    check({"books": sources["books"]}, record)
    flip(root / "code/train-00000.bin", 0)
    assert check(sources, record) == []
    assert sorted(json.loads(record.read_text())) == sorted(FILES)


def test_a_file_that_cannot_be_read_while_it_is_compared_is_named(
    root, sources, record, monkeypatch
):
    check(sources, record)
    later(root / FILES[0])

    def fails(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(manifest, "file_sha256", fails)
    assert f"{root / FILES[0]}: Input/output error" in refused(sources, record)


def test_sources_behind_a_url_have_no_fingerprints(root, sources, record):
    fs = fsspec.filesystem("memory")
    for file in (root / "code").iterdir():
        fs.pipe_file(f"/fingerprints/code/{file.name}", file.read_bytes())
    remote = open_sources("memory://fingerprints", ["code"])
    assert check(remote, record) == [] and not record.exists()
    check(sources, record)  # local when the run began, in a bucket now
    before = record.read_text()
    assert check({**sources, **remote}, record) == [] and record.read_text() == before
    fs.rm("/fingerprints", recursive=True)
