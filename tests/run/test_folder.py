"""A run folder: what only informs never stands in the way of a start."""

import json
import os
import shutil
import subprocess

import pytest

from stablelm_jax.run import folder as folder_module
from stablelm_jax.run.folder import RunFolder, git_commit
from stablelm_jax.tokenizer.tokenizer import ARCADE100K


def started(path):
    """One start as far as the folder is concerned; (lines about what was moved, events told)."""
    told, folder = [], RunFolder(path)
    with folder.claimed():
        folder.describe({"seed": 1}, {}, ARCADE100K, lambda event, text: told.append(text))
    return folder.moved_aside, told


def folder_with(name, content):
    """Makes `name` what `content` says: bytes of a file, a folder, or a link to nowhere."""

    def make(path):
        if content == "folder":
            (path / name / "inside").mkdir(parents=True)
        elif content == "link":
            (path / name).symlink_to(path / "not_mounted")
        else:
            (path / name).write_bytes(content)

    return make


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("environment.json", x) for x in (b"", b"{}", b"[{", b"\0" * 99, b"\xff[]", b"[" * 9999)),
        *(("shards.json", x) for x in (b"", b"[1]", b"null")),
        *((f"{x}.json", "folder") for x in ("environment", "config", "tokenizer", "shards")),
        *(
            (x, "folder")
            for x in ("metrics.jsonl", "events.jsonl", "loss.png", "report.html", ".lock")
        ),
        *((x, "link") for x in ("environment.json", "events.jsonl", "samples")),
        *((x, b"") for x in ("samples", "profile", "hang", "tensorboard")),
    ],
)
def test_what_cannot_be_used_is_moved_aside_and_told(tmp_path, name, content):
    folder_with(name, content)(tmp_path)
    moved, told = started(tmp_path)
    assert len(moved) == 1 and told == []
    assert moved[0].startswith(f"{tmp_path / name} ") and f"called {name}.damaged" in moved[0]
    assert os.path.lexists(tmp_path / f"{name}.damaged")
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 1
    assert json.loads((tmp_path / "config.json").read_text())["config"] == {"seed": 1}
    assert (tmp_path / "samples").is_dir()


def test_what_is_not_permitted_is_moved_aside_too(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "metrics.jsonl")
    moved, _ = started(tmp_path)
    assert "metrics.jsonl may not be read or written" in moved[0]


def test_an_event_begins_a_line_of_its_own_after_one_that_was_cut_short(tmp_path):
    for before, after in ((b'{"a": 1}\n{"b', b'{"a": 1}\n{"b\n'), (b'{"a": 1}\n', b'{"a": 1}\n')):
        (tmp_path / "events.jsonl").write_bytes(before)
        assert started(tmp_path) == ([], [])
        assert (tmp_path / "events.jsonl").read_bytes() == after


def test_each_start_is_added_to_those_before_it(tmp_path):
    for number in (1, 2, 3):
        assert started(tmp_path) == ([], [])
        assert len(json.loads((tmp_path / "environment.json").read_text())) == number


def test_a_disk_that_takes_no_description_is_told_and_the_run_goes_on(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_module, "write_json", full)
    moved, told = started(tmp_path)
    assert moved == [] and "No space left" in told[0] and "goes on" in told[0]


@pytest.fixture
def repository(tmp_path):
    """Somebody's git repository with one commit, and a function that gives the path of a file."""
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path))
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    subprocess.run([*git, "tag", "-a", "-m", "one", "v1.0"], check=True)
    shutil.copy(folder_module.__file__, tmp_path / "folder.py")
    return tmp_path


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
@pytest.mark.parametrize("place", ["venv/site-packages", "vendored", ""])
def test_the_commit_of_somebody_elses_repository_is_not_recorded(repository, place, monkeypatch):
    file = repository / place / "stablelm_jax" / "run" / "folder.py"
    file.parent.mkdir(parents=True)
    monkeypatch.setattr(folder_module, "__file__", str(file))
    (repository / "pyproject.toml").write_text('[project]\nname = "theirs"\n')
    assert git_commit.__wrapped__() is None


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_of_the_packages_own_source_tree_is(repository, monkeypatch):
    file = repository / "stablelm_jax" / "run" / "folder.py"
    file.parent.mkdir(parents=True)
    file.touch()
    (repository / "pyproject.toml").write_text('[project]\nname = "stablelm_jax"\n')
    monkeypatch.setattr(folder_module, "__file__", str(file))
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as in a hook of another repository
    assert len(git_commit.__wrapped__()) == 40  # not the name of a tag
    subprocess.run(
        ["git", "add", "."], cwd=repository, check=True, env={"PATH": os.environ["PATH"]}
    )
    assert git_commit.__wrapped__().endswith("-dirty")
