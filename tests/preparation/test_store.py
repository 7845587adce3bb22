"""prepare --output gs://...: the source arrives whole, manifest last, or it is not there."""

import json

import pytest

from stablelm_jax import prepare
from stablelm_jax.preparation import store
from stablelm_jax.storage import remote


@pytest.fixture
def asked(tmp_path, tokenizer_file):
    """The arguments but for where to."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}\n"}) + "\n" for i in range(300)))
    return ["--source", "news", "--input", str(path), "--tokenizer", str(tokenizer_file)] + [
        "--shard-tokens", "1000", "--workers", "1",
    ]  # fmt: skip


def objects(gcs, bucket):
    return {k.partition("/")[2]: v for k, v in gcs.objects.items() if k.startswith(f"{bucket}/")}


def test_what_arrives_is_what_a_folder_would_hold_and_is_known_again(asked, gcs, tmp_path, capsys):
    assert prepare.main([*asked, "--output", str(tmp_path / "local")]) == 0
    local = {path.name: path.read_bytes() for path in (tmp_path / "local/news").iterdir()}
    there = ["--output", "gs://arriving/data", "--work-folder", str(tmp_path / "work")]
    mine = tmp_path / "work/news/my_notes.jsonl"  # is neither sent nor removed
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    assert prepare.main([*asked, *there]) == 0
    assert objects(gcs, "arriving") == {f"data/news/{name}": d for name, d in local.items()}
    assert len(local) > 6 and list(mine.parent.iterdir()) == [mine]
    gcs.requests.clear()
    assert prepare.main([*asked, *there]) == 0
    said = capsys.readouterr().out
    assert "gs://arriving/data/news: already prepared, 300 documents" in said
    assert not any(request.startswith("POST") for request in gcs.requests)
    assert prepare.main([*asked, *there, "--held-out", "0.2"]) == 1
    error = capsys.readouterr().err
    assert "gs://arriving/data/news was prepared with other held_out" in error
    assert "or remove gs://arriving/data/news" in error
    assert prepare.main(["--verify", "gs://arriving/data"]) == 0


def test_a_sending_that_failed_goes_on_and_leaves_no_manifest_before(
    asked, gcs, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(remote, "_WAITS", ())
    monkeypatch.setattr(store, "_THREADS", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fs = remote.filesystem("gs://failing")[0]
    put, sent = fs.put_file, []

    def put_file(path, target, **options):
        if len(sent) == 3:
            raise ConnectionResetError("gone")
        sent.append(target)
        put(path, target, **options)

    monkeypatch.setattr(fs, "put_file", put_file)
    there = ["--output", "gs://failing/data"]
    assert prepare.main([*asked, *there]) == 1
    error = capsys.readouterr().err
    assert "gone" in error and "gs://failing/data/news" in error
    first = objects(gcs, "failing")
    assert len(first) == 3 and "data/news/manifest.json" not in first
    gcs.put(f"failing/{min(first)}", b"somebody cut it")
    sent[:] = [""] * 4  # fails no more
    assert prepare.main([*asked, *there]) == 1
    assert not {f"failing/{name}" for name in first} & set(sent)
    assert "15 bytes where" in capsys.readouterr().err
    assert "data/news/manifest.json" not in objects(gcs, "failing")
    assert prepare.main([*asked, *there]) == 0
    assert sent[-1].endswith("manifest.json")
    assert prepare.main(["--verify", "gs://failing/data"]) == 0


def test_a_store_that_ends_with_the_process_is_refused(asked, capsys):
    assert prepare.main([*asked, "--output", "memory://data"]) == 2
    err = capsys.readouterr().err
    assert "memory:// is gone with this process" in err and err.count("\n") == 1


def test_file_urls_are_paths_of_this_machine(asked, tmp_path, capsys):
    data = tmp_path / "a b"
    url = f"file://{tmp_path}/a%20b"
    assert prepare.main([*asked, "--output", f"file://{data}"]) == 0
    assert (data / "news" / "manifest.json").exists()
    assert prepare.main(["--verify", url]) == 0
    assert prepare.main(["--dedup", url, "--output", f"file://{tmp_path}/clean"]) == 0
    assert (tmp_path / "clean" / "dedup.json").exists()
    assert "sent to" not in capsys.readouterr().out
