"""A file that is written is the old one or the new one, never half of either."""

from __future__ import annotations

import math

import pytest

from stablelm_jax.storage.files import new_result, replacing, write_json, write_text


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
