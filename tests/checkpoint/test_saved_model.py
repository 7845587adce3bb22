"""A checkpoint finds the tokenizer it was trained with, wherever it lies now."""

import shutil

import pytest
from tiny import write_tokenizer

from stablelm_jax.checkpoint import saved_model
from stablelm_jax.checkpoint.names import find_checkpoint
from stablelm_jax.checkpoint.saved_model import load_own_tokenizer
from stablelm_jax.model.config import STABLELM_2_1_6B
from stablelm_jax.tokenizer.tokenizer import ARCADE100K, load_tokenizer


@pytest.fixture
def trained(tmp_path):
    """(path of a checkpoint in a run's folder, its item `run`, the tokenizer.json)."""
    file = write_tokenizer(tmp_path / "tokenizer.json")
    path = tmp_path / "run" / "checkpoints" / "global_step5"
    path.mkdir(parents=True)
    sha256 = load_tokenizer(file).sha256
    run = {"config": {"data": {"tokenizer": str(file)}}, "tokenizer_sha256": sha256}
    return path, run, file


def test_first_where_the_training_had_it(trained):
    path, run, file = trained
    assert load_own_tokenizer(path, run).name == str(file)


def test_then_in_the_checkpoint_or_in_the_folder_of_its_run(trained):
    path, run, file = trained
    kept = shutil.move(file, path / "tokenizer.json")
    assert load_own_tokenizer(path, run).name == str(kept)
    kept = shutil.move(kept, path.parent.parent / "tokenizer.json")
    assert load_own_tokenizer(path, run).name == str(kept)


def test_another_one_is_never_taken(trained):
    path, run, file = trained
    file.rename(path / "tokenizer.json")
    file.write_bytes((path / "tokenizer.json").read_bytes().replace(b"w100", b"w999"))
    assert load_own_tokenizer(path, run).name == str(path / "tokenizer.json")
    with pytest.raises(ValueError, match="another tokenizer.*--tokenizer"):
        load_own_tokenizer(path, run, str(file))


def test_where_it_is_nowhere_the_places_are_named(trained):
    path, run, file = trained
    file.unlink()
    with pytest.raises(ValueError, match=f"{file}.*--tokenizer"):
        load_own_tokenizer(path, run)


def test_an_imported_checkpoint_without_a_file_has_arcade100k(tmp_path):
    run = {"tokenizer_sha256": load_tokenizer(ARCADE100K).sha256}
    assert load_own_tokenizer(tmp_path / "global_step0", run).name == ARCADE100K


def test_the_folder_of_a_run_stands_for_its_newest_checkpoint(tmp_path):
    for step in (5, 20, 100):
        (tmp_path / "checkpoints" / f"global_step{step}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "global_step900.damaged").mkdir()
    newest = tmp_path / "checkpoints" / "global_step100"
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path / "checkpoints") == newest
    assert find_checkpoint(newest) == newest
    with pytest.raises(ValueError, match="holds none"):
        find_checkpoint(newest / "nothing")


def test_a_link_to_a_checkpoint_stands_for_it_and_a_moved_one_keeps_its_name_and_run(trained):
    path, run, file = trained
    top = path.parents[2]
    (top / "best").symlink_to(path)
    assert find_checkpoint(top / "best") == path
    file.rename(path.parent.parent / "tokenizer.json")
    path.rename(top / "moved")
    path.symlink_to(top / "moved")
    assert find_checkpoint(path) == find_checkpoint(path.parent.parent) == path
    assert load_own_tokenizer(path, run).name == str(path.parent.parent / "tokenizer.json")


def test_a_path_that_may_mean_two_checkpoints_or_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is empty; give the path"):
        find_checkpoint("")
    for name in ("global_step0", "checkpoints/global_step12"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="global_step0 or .*checkpoints/global_step12"):
        find_checkpoint(tmp_path)


def test_a_model_with_a_field_of_another_version_is_named(tmp_path, monkeypatch):
    run = {"model_config": {**vars(STABLELM_2_1_6B), "sliding_window": 4}, "step": 0}
    monkeypatch.setattr(saved_model, "read_run", lambda path: run)
    with pytest.raises(ValueError, match="sliding_window.*use the version of stablelm_jax"):
        saved_model.SavedModel.open(tmp_path / "global_step0")
