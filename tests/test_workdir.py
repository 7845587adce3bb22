"""What --workdir may name, and what is said of what it may not."""

import json

import pytest

from stablelm_jax.config import ConfigError
from stablelm_jax.workdir import check_workdir


@pytest.fixture
def run(tmp_path):
    """The folder of a run with a checkpoint."""
    (tmp_path / "run/checkpoints/global_step12/params").mkdir(parents=True)
    (tmp_path / "run/metrics.jsonl").touch()
    (tmp_path / "run/config.json").write_text(json.dumps({"config": {"model": {}}, "set_by": {}}))
    return tmp_path / "run"


def refusal(path):
    with pytest.raises(ConfigError) as error:
        check_workdir(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "inside",
    [
        "global_step12",
        "global_step12/",
        "global_step12/params",
        "global_step40",
        "global_step4.damaged",
    ],
)
def test_a_checkpoint_is_refused_with_its_run_and_the_way_to_branch(run, inside):
    said = refusal(f"{run}/checkpoints/{inside}")
    assert f"--workdir {run} to go on" in said
    assert f"--config.branch.parent={run}/checkpoints/global_step" in said


def test_the_folder_of_a_runs_checkpoints_is_refused_with_the_run(run, tmp_path):
    assert f"write --workdir {run} " in refusal(run / "checkpoints")
    (tmp_path / "link").symlink_to(run / "checkpoints")
    assert f"write --workdir {run} " in refusal(tmp_path / "link")
    (tmp_path / "latest").symlink_to(run / "checkpoints/global_step12")
    assert f"--workdir {run} " in refusal(tmp_path / "latest")


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_one_is_refused(text):
    assert "is empty; write another folder, such as runs/NAME" in refusal(text)


@pytest.mark.parametrize(
    ("files", "what"),
    [
        (["global_step0/params/x"], "holds checkpoints itself, as an imported model does"),
        (["config.json", "model.safetensors"], "is a Hugging Face model"),
        (["model-00001-of-00002.safetensors"], "is a Hugging Face model"),
        (["config.json"], "is a Hugging Face model"),
        (["manifest.json", "train-00000.bin"], "is a folder of prepared data"),
        (["web/manifest.json", "code/manifest.json"], "is a folder of prepared data"),
    ],
)
def test_a_folder_of_another_kind_is_refused_for_what_it_is(tmp_path, files, what):
    for file in files:
        (tmp_path / "x" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / file).write_text('{"model_type": "stablelm"}')
    assert f"{what}; write another folder" in refusal(tmp_path / "x")


def test_a_file_and_a_link_to_nowhere_are_refused_also_as_a_folder_above(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "not_mounted")
    for name, what in (("file", "a file"), ("link", "a link to .*not_mounted, which is not there")):
        for path in (tmp_path / name, tmp_path / name / "run"):
            with pytest.raises(ConfigError, match=f"{name} is {what}; write another"):
                check_workdir(path)


def test_a_new_folder_and_that_of_a_run_pass_however_they_are_reached(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "empty").mkdir()
    for path in (run, tmp_path / "link", tmp_path / "empty", tmp_path / "new/er", tmp_path):
        check_workdir(path)
    check_workdir(tmp_path / "checkpoints")  # the name alone says nothing
    # What has begun beside prepared data goes on.
    (run / "web").mkdir()
    (run / "web/manifest.json").touch()
    check_workdir(run)


def test_behind_a_url_the_names_say_it(gcs):
    assert "is a checkpoint" in refusal("gs://bucket/runs/one/checkpoints/global_step3")
    check_workdir("gs://bucket/runs/one")
