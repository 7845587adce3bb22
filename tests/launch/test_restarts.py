"""launch/restarts.py: a training is started again while that brings newer checkpoints."""

import json
import runpy
from pathlib import Path

import pytest

main = runpy.run_path(str(Path(__file__).parents[2] / "launch" / "restarts.py"))["main"]


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "run"


def save(workdir, step):
    (workdir / "checkpoints" / f"global_step{step}").mkdir(parents=True)


def starts_until_refused(workdir, first=0, launch="job-1", at_most=20):
    for number in range(first, at_most):
        if main([str(workdir), launch, str(number)]):
            return number - first
    return at_most


def test_five_starts_without_any_checkpoint_are_allowed(workdir, capsys):
    assert starts_until_refused(workdir) == 5
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error:") and "5 starts in a row" in error
    assert "no checkpoint so far" in error


def test_five_starts_from_the_same_checkpoint_are_allowed(workdir, capsys):
    save(workdir, 120)
    assert starts_until_refused(workdir) == 5
    assert "newest checkpoint: global_step120" in capsys.readouterr().err


def test_a_newer_checkpoint_begins_the_count_anew(workdir):
    for number in range(12):
        assert main([str(workdir), "job-1", str(number)]) == 0
        save(workdir, number)
    assert starts_until_refused(workdir, first=12) == 5


def test_a_checkpoint_that_is_half_written_or_damaged_is_no_progress(workdir):
    save(workdir, 120)
    for number in range(4):
        assert main([str(workdir), "job-1", str(number)]) == 0
    (workdir / "checkpoints" / "global_step130.orbax-checkpoint-tmp").mkdir()
    (workdir / "checkpoints" / "global_step120").rename(
        workdir / "checkpoints/global_step120.damaged"
    )
    save(workdir, 110)
    assert main([str(workdir), "job-1", "4"]) == 0
    assert main([str(workdir), "job-1", "5"]) == 1
    save(workdir, 115)
    assert main([str(workdir), "job-1", "5"]) == 0


def test_to_ask_twice_about_one_start_changes_nothing(workdir):
    """An answer that gets lost on the way is asked for again."""
    for _ in range(9):
        assert main([str(workdir), "job-1", "1"]) == 0
    assert starts_until_refused(workdir, first=1) == 4


def test_a_launch_by_hand_begins_the_count_anew(workdir):
    assert starts_until_refused(workdir, launch="job-1") == 5
    assert starts_until_refused(workdir, launch="job-2") == 5


def test_a_first_start_leaves_no_trace_in_a_folder_without_checkpoints(workdir):
    """It may be a folder that the training will refuse."""
    assert main([str(workdir), "job-1", "0"]) == 0
    assert not workdir.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"launch": "job-1"}', "null"])
def test_a_note_that_is_not_whole_is_written_anew(workdir, content):
    save(workdir, 3)
    (workdir / "restarts.json").write_text(content)
    assert main([str(workdir), "job-1", "7"]) == 0
    note = json.loads((workdir / "restarts.json").read_text())
    assert note == {"launch": "job-1", "newest": 3, "since": 7}


def test_where_nothing_can_be_remembered_every_start_counts(workdir, capsys):
    save(workdir, 3)
    (workdir / "restarts.json").mkdir()
    assert starts_until_refused(workdir) == 5
    assert "restarts.json cannot be written" in capsys.readouterr().err


def test_a_run_in_a_bucket_is_counted_too(gcs, capsys):
    assert starts_until_refused("gs://launches/run") == 5
    assert json.loads(gcs.objects["launches/run/restarts.json"])["newest"] == -1
