"""Stamps: a shard changed under a run is found and named, one that was only touched passes."""

from __future__ import annotations

import builtins
import json
import os
import shutil
from pathlib import Path

import fsspec
import pytest
from prepared import EOD, write_source

from stablelm_jax.data import fingerprints
from stablelm_jax.data.manifest import Source, open_sources
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


def checked(sources, recorded) -> tuple[fingerprints.Stamps, list[str]]:
    lines = []
    return fingerprints.check(sources, recorded, lines.append), lines


def refused(sources, recorded) -> str:
    with pytest.raises(ShardError, match="changed since this run began") as caught:
        checked(sources, recorded)
    message = str(caught.value)
    assert "Restore" in message and "start another run" in message
    return message


def test_stamps_are_size_and_time_of_both_files_of_every_shard(root, sources):
    taken = fingerprints.take(sources)
    assert sorted(taken) == sorted(FILES)
    for key, stamp in taken.items():
        status = (root / key).stat()
        assert stamp == [status.st_size, status.st_mtime_ns]


def test_shards_that_nobody_touched_pass_unread_after_a_way_through_json(sources, monkeypatch):
    recorded = json.loads(json.dumps(fingerprints.take(sources)))

    def opened(*args, **kwargs):
        raise AssertionError(f"{args[0]} was opened")

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", opened)
        patch.setattr(os, "open", opened)
        now, lines = checked(sources, recorded)
    assert now == recorded and lines == []


def test_touched_shards_pass_and_are_recorded_anew(root, sources):
    recorded = fingerprints.take(sources)
    later(root / FILES[0])
    later(root / FILES[3])
    now, lines = checked(sources, recorded)
    assert [line.split(":")[0] for line in lines] == [str(root / FILES[0]), str(root / FILES[3])]
    assert now == fingerprints.take(sources) != recorded
    assert checked(sources, now) == (now, [])


def test_a_copy_of_the_data_in_another_place_passes(root, sources, tmp_path):
    recorded = fingerprints.take(sources)
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    copy = open_sources(tmp_path / "copy", NAMES)
    now, lines = checked(copy, recorded)
    assert len(lines) == len(FILES) and set(now) == set(recorded)


@pytest.mark.parametrize("key", [key for key in FILES if key.endswith(".bin")])
def test_one_flipped_bit_under_the_same_size_is_refused_and_named(root, sources, key):
    recorded = fingerprints.take(sources)
    flip(root / key, 3)
    message = refused(sources, recorded)
    assert str(root / key) in message and "sha256" in message
    assert all(str(root / other) not in message for other in FILES if other != key)


def test_every_changed_file_is_named_not_only_the_first(root, sources):
    recorded = fingerprints.take(sources)
    changed = ("books/train-00001.bin", "code/held_out-00000.bin")
    for key in changed:
        flip(root / key, 0)
    message = refused(sources, recorded)
    assert [key for key in FILES if str(root / key) in message] == list(changed)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_file_cut_short_is_refused_and_named(root, sources, suffix):
    recorded = fingerprints.take(sources)
    path = root / f"code/train-00000.{suffix}"
    os.truncate(path, path.stat().st_size - 4)
    assert str(path) in refused(sources, recorded)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_file_that_is_gone_is_refused_and_named(root, sources, suffix):
    recorded = fingerprints.take(sources)
    path = root / f"books/held_out-00000.{suffix}"
    path.unlink()
    with pytest.raises(ShardError, match="missing; restore it") as caught:
        checked(sources, recorded)
    assert str(path) in str(caught.value)


def test_an_index_that_contradicts_itself_is_refused_and_named(root, sources):
    recorded = fingerprints.take(sources)
    path = root / "books/train-00000.idx"
    flip(path, 34)  # the length of the first document
    assert f"{path}: sequences do not lie one after the other" in refused(sources, recorded)


def test_shards_prepared_anew_in_the_same_place_are_refused(root, sources, tmp_path):
    """Index and tokens fit each other, but they are not those of the manifest that was read."""
    recorded = fingerprints.take(sources)
    fewer = write_source(tmp_path / "other", "books", [DOCUMENTS[1:], DOCUMENTS[:2]])
    for suffix in ("bin", "idx"):
        name = f"train-00000.{suffix}"
        shutil.copyfile(fewer.directory / name, root / "books" / name)
    message = refused(sources, recorded)
    assert "20 bytes where the manifest says 36" in message and "train-00001" not in message


def test_a_source_that_was_not_recorded_passes(root, sources):
    recorded = fingerprints.take({"books": sources["books"]})
    flip(root / "code/train-00000.bin", 0)
    now, lines = checked(sources, recorded)
    assert sorted(now) == sorted(FILES) and lines == []


def test_a_file_that_cannot_be_read_while_it_is_compared_is_named(root, sources, monkeypatch):
    recorded = fingerprints.take(sources)
    later(root / FILES[0])

    def fails(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(fingerprints, "file_sha256", fails)
    with pytest.raises(ShardError, match="Input/output error") as caught:
        checked(sources, recorded)
    assert str(root / FILES[0]) in str(caught.value)


def test_sources_behind_a_url_have_no_stamps(root, sources):
    fs = fsspec.filesystem("memory")
    for file in (root / "code").iterdir():
        fs.pipe_file(f"/stamps/code/{file.name}", file.read_bytes())
    mixed: dict[str, Source] = {**sources, **open_sources("memory://stamps", ["code"])}
    taken = fingerprints.take(mixed)
    assert {key.split("/")[0] for key in taken} == {"books"}
    recorded = fingerprints.take(sources)  # local when the run began, in a bucket now
    assert checked(mixed, recorded) == (taken, [])
    fs.rm("/stamps", recursive=True)
