"""A run folder behind a URL: all of it arrives, in parts, and a failing store ends no run."""

from __future__ import annotations

import itertools
import time

import fsspec
import pytest
from etils import epath

from stablelm_jax.checkpoint.reading import CheckpointError, read_run
from stablelm_jax.run import mirror as mirror_module
from stablelm_jax.run.folder import RunFolder
from stablelm_jax.run.metrics import MetricsFile
from stablelm_jax.run.mirror import Mirror, mirror_folder
from stablelm_jax.storage import remote

NEVER = 1e6  # seconds between uploads of which a test wants none
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
    """Of a run that has a checkpoint: another start goes on with it."""
    url = f"memory://runs/{next(NAMES)}"
    store.pipe_file(f"{url}/checkpoints/global_step0/commit_success.txt", b"")
    return url


def begun(url, folder, every=NEVER):
    folder.mkdir(exist_ok=True)
    spool = Mirror(url, folder, every)
    spool.start()
    return spool, MetricsFile(folder / "metrics.jsonl")


def stored(store, url) -> str:
    """The file that the parts make."""
    paths = sorted(store.find(f"{url}/metrics"))
    return b"".join(store.cat_file(path) for path in paths).decode()


def lines(*steps):
    return [{"step": step, "loss": 1.0 / (step + 1)} for step in steps]


def test_the_parts_in_order_are_the_file_and_only_the_last_is_written_again(
    store, url, tmp_path, monkeypatch
):
    monkeypatch.setattr(mirror_module, "PART_BYTES", 100)
    spool, metrics = begun(url, tmp_path / "here")
    written, pipe_file = [], store.pipe_file

    def noted(path, data):
        written.append(path)
        pipe_file(path, data)

    monkeypatch.setattr(store, "pipe_file", noted)
    for line in lines(*range(20)):
        metrics.append(line)
        spool.upload()
        assert stored(store, url) == metrics.path.read_text()
    names = sorted(path.rsplit("/", 1)[-1] for path in store.find(f"{url}/metrics"))
    assert len(names) > 5 and names[0] == "part-000000000000.jsonl"
    assert written == sorted(written)  # none but the last
    assert len(written) <= 20 + len(names)
    spool.stop()


def test_a_line_that_is_half_written_waits(store, url, tmp_path):
    spool, metrics = begun(url, tmp_path / "here")
    metrics.append(lines(1)[0])
    with metrics.path.open("a") as file:
        file.write('{"step": 2, "lo')
    spool.upload()
    assert stored(store, url).count("\n") == 1 and stored(store, url).endswith("}\n")
    spool.stop()


@pytest.mark.parametrize("part_bytes", [40, 100, 10**6])
def test_another_host_goes_on_from_the_checkpoint_with_the_lines_before_it(
    store, url, tmp_path, monkeypatch, part_bytes
):
    monkeypatch.setattr(mirror_module, "PART_BYTES", part_bytes)
    spool, metrics = begun(url, tmp_path / "one")
    for line in lines(*range(1, 10)):
        metrics.append(line)
    spool.stop()
    spool, metrics = begun(url, tmp_path / "two")
    assert metrics.read() == lines(*range(1, 10))
    metrics.cut_back(4)
    for line in lines(5, 60, 70, 80, 90, 100, 110):  # longer than before the cut
        metrics.append(line)
    spool.finish()
    assert stored(store, url) == metrics.path.read_text()
    _, metrics = begun(url, tmp_path / "one")  # the first host again: its own lines are old
    assert metrics.read() == lines(1, 2, 3, 4, 5, 60, 70, 80, 90, 100, 110)


def test_lines_that_never_arrived_are_kept_by_the_next_start_on_the_same_host(store, url, tmp_path):
    spool, metrics = begun(url, tmp_path / "here")
    metrics.append(lines(1)[0])
    spool.upload()
    metrics.append(lines(2)[0])  # and now the process is killed
    _, metrics = begun(url, tmp_path / "here")
    assert metrics.read() == lines(1, 2)


def test_a_new_run_under_an_old_name_starts_from_an_empty_folder(store, url, tmp_path):
    spool, metrics = begun(url, tmp_path / "here")
    metrics.append(lines(1)[0])
    (tmp_path / "here" / "samples").mkdir()
    (tmp_path / "here" / "samples" / "old.txt").write_text("old")
    spool.finish()
    store.rm(url, recursive=True)
    spool, metrics = begun(url, tmp_path / "here")
    assert metrics.read() == []
    spool.finish()
    assert not store.exists(f"{url}/samples/old.txt")


def test_a_store_that_cannot_be_listed_is_an_error_and_not_a_new_run(
    store, url, tmp_path, monkeypatch
):
    spool, metrics = begun(url, tmp_path / "here")
    metrics.append(lines(1)[0])

    def fails(*_, **__):
        raise ConnectionResetError("gone away")

    monkeypatch.setattr(store, "ls", fails)
    with pytest.raises(OSError, match=f"listing {url}/checkpoints failed 5 times, Connection"):
        begun(url, tmp_path / "here")
    assert metrics.read() == lines(1)


def test_files_arrive_where_they_would_lie_and_only_when_changed(store, url, tmp_path):
    spool, _ = begun(url, tmp_path / "here")
    for name in ("config.json", "samples/a.txt", "profile/x/y.pb"):
        path = tmp_path / "here" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    for name in (".lock", "loss.png.partial"):
        (tmp_path / "here" / name).write_text("not for others")
    spool.upload()
    found = {path.split(url.split("://")[1] + "/")[1] for path in store.find(url)}
    assert {"config.json", "samples/a.txt", "profile/x/y.pb"} == {
        name for name in found if not name.startswith("checkpoints")
    }
    store.pipe_file(f"{url}/config.json", b"touched")
    spool.upload()
    assert store.cat_file(f"{url}/config.json") == b"touched"
    (tmp_path / "here" / "config.json").write_text("changed")
    spool.finish()
    assert store.cat_file(f"{url}/config.json") == b"changed"


def test_environment_json_goes_on_from_host_to_host(store, url, tmp_path):
    spool, _ = begun(url, tmp_path / "one")
    (tmp_path / "one" / "environment.json").write_text("[1]")
    spool.finish()
    begun(url, tmp_path / "two")
    assert (tmp_path / "two" / "environment.json").read_text() == "[1]"


def test_it_uploads_by_itself_every_so_often(store, url, tmp_path):
    spool, metrics = begun(url, tmp_path / "here", every=0.05)
    metrics.append(lines(1)[0])
    for _ in range(200):
        if store.exists(f"{url}/metrics"):
            break
        time.sleep(0.02)
    assert stored(store, url) == metrics.path.read_text()
    spool.finish()


def test_a_failing_store_is_loud_ends_no_run_and_gets_everything_later(
    store, url, tmp_path, monkeypatch, caplog
):
    spool, metrics = begun(url, tmp_path / "here")
    metrics.append(lines(1)[0])
    (tmp_path / "here" / "config.json").write_text("{}")

    def fails(*_, **__):
        raise ConnectionResetError("gone away")

    with monkeypatch.context() as patch:
        patch.setattr(store, "pipe_file", fails)
        patch.setattr(store, "put_file", fails)
        spool.upload()
        assert "metrics.jsonl was not uploaded (ConnectionResetError: gone away)" in caplog.text
        assert "config.json was not uploaded" in caplog.text
        with pytest.raises(OSError, match="run the same command again.*metrics.jsonl: Conn") as e:
            spool.finish()
        assert str(tmp_path / "here") in str(e.value) and url in str(e.value)
    spool.finish()
    assert stored(store, url) == metrics.path.read_text()
    assert store.exists(f"{url}/config.json")


def test_a_part_that_is_gone_is_an_error_and_not_a_hole(store, url, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror_module, "PART_BYTES", 40)
    spool, metrics = begun(url, tmp_path / "one")
    for line in lines(*range(5)):
        metrics.append(line)
    spool.finish()
    store.rm(sorted(store.find(f"{url}/metrics"))[1])
    with pytest.raises(OSError, match="does not begin where the one before ends"):
        begun(url, tmp_path / "two")


def test_two_trainings_of_one_machine_cannot_share_a_url(gcs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = "gs://bucket/runs/claimed"
    one, two = RunFolder(url), RunFolder(url)
    one.create()
    with one.claimed(), pytest.raises(ValueError, match=f"another process trains in {url}"):
        with two.claimed():
            pass


def test_a_local_run_folder_lies_where_it_always_did(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert folder.path == tmp_path / "run"
    assert str(folder.checkpoints) == str(tmp_path / "run" / "checkpoints")


def test_urls_have_spools_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = {mirror_folder(f"gs://{bucket}/run") for bucket in "ab"}
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
