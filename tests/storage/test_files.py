"""A file that is written is the old one or the new one, never half of either."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

import pytest

from stablelm_jax.storage.files import check_writable, new_result, replacing, write_json, write_text


def test_a_file_has_its_old_contents_until_the_new_ones_are_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with replacing(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [path] == list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(error), replacing(path) as aside:
        aside.write_text("new")
        raise error
    assert path.read_text() == "old" and [path] == list(tmp_path.iterdir())


def test_json_without_a_meaning_in_json_is_not_written(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": math.nan})
    assert (tmp_path / "a.json").read_text() == '{\n "a": 1\n}\n'


def test_a_folder_appears_whole_and_replaces_another_only_when_told_to(tmp_path):
    out = tmp_path / "out"
    for number, force in ((1, False), (2, True)):
        with new_result(out, force=force) as aside:
            aside.mkdir()
            (aside / "file").write_text(str(number))
            assert not out.exists() or (out / "file").read_text() == "1"
        assert (out / "file").read_text() == str(number)
    with pytest.raises(ValueError, match="--force"), new_result(out):
        pass
    with pytest.raises(ValueError, match="holds what is converted"):
        with new_result(tmp_path, force=True, source=out):
            pass
    assert list(tmp_path.iterdir()) == [out]


def test_what_gets_a_name_is_on_the_disk_by_then_and_so_is_the_name(tmp_path, monkeypatch):
    done, sync, rename = [], os.fsync, os.replace

    def synced(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def renamed(old, new):
        done.append("renamed")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_text(tmp_path / "a.txt", "a")
    assert done == ["a.txt.partial", "renamed", tmp_path.name]
    done.clear()
    with new_result(tmp_path / "out") as aside:
        aside.mkdir()
        (aside / "file").write_text("1")
    assert done == ["file", "out", "renamed", tmp_path.name]


def test_a_file_system_that_flushes_files_only_will_do(tmp_path, monkeypatch):
    sync = os.fsync

    def refuse_folders(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write_text(tmp_path / "a.txt", "a")
    assert (tmp_path / "a.txt").read_text() == "a"


def test_a_place_where_nothing_can_be_written_is_found_before_the_work(tmp_path):
    there = tmp_path / "there.json"
    there.write_text("old")
    check_writable(there)
    check_writable(tmp_path / "new.json")
    assert there.read_text() == "old" and list(tmp_path.iterdir()) == [there]
    for path, why in (
        (tmp_path / "none" / "a.json", "No such file.*make its folder"),
        (there / "a.json", "Not a directory"),
        (tmp_path, "is a folder; name another"),
        (Path("/dev/null"), "is no ordinary file; name another"),
        (tmp_path / ("x" * 300), "too long"),
    ):
        with pytest.raises(ValueError, match=why):
            check_writable(path)
