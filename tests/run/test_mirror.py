"""A run folder behind a URL: all of it arrives, and a failing store ends no run."""

from __future__ import annotations

import itertools

import fsspec
import pytest
from etils import epath

from stablelm_jax.checkpoint.reading import CheckpointError, read_run
from stablelm_jax.run.folder import RunFolder
from stablelm_jax.run.metrics import MetricsFile
from stablelm_jax.run.mirror import RemoteMirror
from stablelm_jax.storage import remote

NAMES = (f"run{number}" for number in itertools.count())


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    monkeypatch.setattr(remote, "_WAITS", (0.0,) * 4)


@pytest.fixture
def store():
    """fsspec's memory, of which a test sees one folder."""
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()


@pytest.fixture
def url(store):
    """The URL of a run that has a checkpoint: another start goes on with it."""
    url = f"memory://runs/{next(NAMES)}"
    store.pipe_file(f"{url}/checkpoints/global_step0/commit_success.txt", b"")
    return url


def begun(url, host):
    """A start of the run on the machine whose cache is the folder `host`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(host))
        mirror = RemoteMirror(url)
    mirror.folder.mkdir(parents=True, exist_ok=True)
    mirror.fetch()
    return mirror, MetricsFile(mirror.folder / "metrics.jsonl")


def stored(store, url) -> str:
    return store.cat_file(f"{url}/metrics.jsonl").decode()


def lines(*steps):
    return [{"step": step, "loss": 1.0 / (step + 1)} for step in steps]


def test_another_host_goes_on_from_the_checkpoint_with_the_lines_before_it(store, url, tmp_path):
    mirror, metrics = begun(url, tmp_path / "one")
    for line in lines(*range(1, 10)):
        metrics.append(line)
    mirror.upload()
    mirror, metrics = begun(url, tmp_path / "two")
    assert metrics.read() == lines(*range(1, 10))
    metrics.cut_back(4)
    for line in lines(5, 60, 70, 80, 90, 100, 110):  # longer than before the cut
        metrics.append(line)
    mirror.finish()
    assert stored(store, url) == metrics.path.read_text()
    _, metrics = begun(url, tmp_path / "one")  # the first host again: its own lines are old
    assert metrics.read() == lines(1, 2, 3, 4, 5, 60, 70, 80, 90, 100, 110)


def test_lines_that_never_arrived_are_kept_by_the_next_start_on_the_same_host(store, url, tmp_path):
    mirror, metrics = begun(url, tmp_path / "here")
    metrics.append(lines(1)[0])
    mirror.upload()
    metrics.append(lines(2)[0])  # and now the process is killed
    _, metrics = begun(url, tmp_path / "here")
    assert metrics.read() == lines(1, 2)


def test_a_new_run_under_an_old_name_starts_from_an_empty_folder(store, url, tmp_path):
    mirror, metrics = begun(url, tmp_path / "here")
    metrics.append(lines(1)[0])
    (mirror.folder / "samples").mkdir()
    (mirror.folder / "samples" / "old.txt").write_text("old")
    mirror.finish()
    store.rm(url, recursive=True)
    mirror, metrics = begun(url, tmp_path / "here")
    assert metrics.read() == []
    mirror.finish()
    assert not store.exists(f"{url}/samples/old.txt")


def test_a_store_that_cannot_be_listed_is_an_error_and_not_a_new_run(
    store, url, tmp_path, monkeypatch
):
    mirror, metrics = begun(url, tmp_path / "here")
    metrics.append(lines(1)[0])

    def fails(*_, **__):
        raise ConnectionResetError("gone away")

    monkeypatch.setattr(store, "ls", fails)
    with pytest.raises(OSError, match=f"listing {url} failed 5 times, Connection"):
        begun(url, tmp_path / "here")
    assert metrics.read() == lines(1)


def test_files_arrive_where_they_would_lie_and_only_when_changed(store, url, tmp_path):
    mirror, _ = begun(url, tmp_path / "here")
    for name in ("config.json", "samples/a.txt", "profile/x/y.pb"):
        path = mirror.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    for name in (".lock", "loss.png.partial"):
        (mirror.folder / name).write_text("not for others")
    mirror.upload()
    found = {path.split(url.split("://")[1] + "/")[1] for path in store.find(url)}
    assert {"config.json", "samples/a.txt", "profile/x/y.pb"} == {
        name for name in found if not name.startswith("checkpoints")
    }
    store.pipe_file(f"{url}/config.json", b"touched")
    mirror.upload()
    assert store.cat_file(f"{url}/config.json") == b"touched"
    (mirror.folder / "config.json").write_text("changed")
    mirror.finish()
    assert store.cat_file(f"{url}/config.json") == b"changed"


def test_environment_json_goes_on_from_host_to_host(store, url, tmp_path):
    mirror, _ = begun(url, tmp_path / "one")
    (mirror.folder / "environment.json").write_text("[1]")
    mirror.finish()
    mirror, _ = begun(url, tmp_path / "two")
    assert (mirror.folder / "environment.json").read_text() == "[1]"


def test_a_failing_store_is_loud_ends_no_run_and_gets_everything_later(
    store, url, tmp_path, monkeypatch, caplog
):
    mirror, metrics = begun(url, tmp_path / "here")
    metrics.append(lines(1)[0])
    (mirror.folder / "config.json").write_text("{}")

    def fails(*_, **__):
        raise ConnectionResetError("gone away")

    with monkeypatch.context() as patch:
        patch.setattr(store, "put_file", fails)
        mirror.upload()
        assert "metrics.jsonl was not uploaded (ConnectionResetError: gone away)" in caplog.text
        assert "config.json was not uploaded" in caplog.text
        with pytest.raises(OSError, match="run the same command again.*metrics.jsonl was not") as e:
            mirror.finish()
        assert str(mirror.folder) in str(e.value) and url in str(e.value)
    mirror.finish()
    assert stored(store, url) == metrics.path.read_text()
    assert store.exists(f"{url}/config.json")


def test_lines_that_an_older_version_stored_in_parts_are_read(store, url, tmp_path):
    parts = {0: b'{"step": 1}\n{"step": 2}\n', 24: b'{"step": 3}\n'}
    for start, part in parts.items():
        store.pipe_file(f"{url}/metrics/part-{start:012d}.jsonl", part)
    mirror, metrics = begun(url, tmp_path / "one")
    assert [line["step"] for line in metrics.read()] == [1, 2, 3]
    metrics.cut_back(1)
    mirror.finish()
    _, metrics = begun(url, tmp_path / "two")  # from now on the whole file counts
    assert [line["step"] for line in metrics.read()] == [1]


def test_two_trainings_of_one_machine_cannot_share_a_url(gcs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = "gs://bucket/runs/claimed"
    one, two = RunFolder(url), RunFolder(url)
    with one.claimed(), pytest.raises(ValueError, match=f"another process trains in {url}"):
        with two.claimed():
            pass


def test_a_local_run_folder_lies_where_it_always_did(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert folder.path == tmp_path / "run"
    assert str(folder.checkpoints) == str(tmp_path / "run" / "checkpoints")


def test_urls_have_folders_of_their_own(gcs, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = {RunFolder(f"gs://{bucket}/run").path for bucket in "ab"}
    assert len(folders) == 2 and all(tmp_path in folder.parents for folder in folders)


@pytest.mark.parametrize("url", ["memory://runs/a", "s3://bucket/run", "gs://bucket", "gs://b/"])
def test_a_url_that_orbax_cannot_write_is_refused_with_a_remedy(url):
    with pytest.raises(ValueError, match="gs://BUCKET/FOLDER.*mount one as a folder"):
        RunFolder(url)


def test_a_checkpoint_in_another_store_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match="s3://bucket/run/global_step5.*mount one as a folder"):
        read_run("s3://bucket/run/global_step5")


def test_a_checkpoint_that_is_not_in_the_bucket_is_named(gcs):
    with pytest.raises(CheckpointError, match="gs://bucket/run/global_step5 is not a checkpoint"):
        read_run("gs://bucket/run/global_step5")


def test_a_store_that_lets_nobody_in_is_one_line_with_the_checkpoint(gcs, monkeypatch):
    class Refused(Exception):
        """What a driver raises is its own."""

    def exists(self):
        raise Refused("Anonymous caller does not have storage.objects.get")

    path = "gs://bucket/run/global_step5"
    monkeypatch.setattr(type(epath.Path(path)), "exists", exists)
    with pytest.raises(OSError, match=f"looking for {path} failed 5 times, Refused: Anonymous"):
        read_run(path)


def test_a_start_that_cannot_read_the_store_puts_nothing_old_into_it(
    store, url, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = RunFolder(tmp_path / "run")  # Orbax, and so a run, knows no memory://
    folder.mirror = RemoteMirror(url)
    folder.path = folder.mirror.folder
    folder.path.mkdir(parents=True)
    (folder.path / "metrics.jsonl").write_text('{"step": 10}\n')  # another host went on since
    store.pipe_file(f"{url}/metrics.jsonl", b'{"step": 10}\n{"step": 20}\n')

    def broken(*_, **__):
        raise ConnectionError("the network is away for a moment")

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "cat_file", broken)
        with pytest.raises(OSError, match="away for a moment"), folder.claimed():
            pass
    assert stored(store, url) == '{"step": 10}\n{"step": 20}\n'
