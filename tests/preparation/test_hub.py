"""Inputs on the Hugging Face Hub: pinned, listed once, few requests, and no byte lost or doubled.

The Hub is tests/fake_hub.py, its client huggingface_hub's own.
"""

import gzip
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import FakeHub
from huggingface_hub import constants

from stablelm_jax import prepare, train_tokenizer
from stablelm_jax.data import manifest
from stablelm_jax.preparation import chunks, hub, progress, readers, streams
from stablelm_jax.preparation.executors import TasksFailed
from stablelm_jax.preparation.formats import Reading
from stablelm_jax.preparation.inputs import InputError, find_files

REPOSITORY = "datasets/some/news"
URL = f"hf://{REPOSITORY}"
PAGE = f"https://huggingface.co/{REPOSITORY}"
SMALL_CHUNKS = str(pathlib.Path(__file__).with_name("in_small_chunks.py"))
ROOT = str(pathlib.Path(prepare.__file__).parents[1])


def some_texts(count, seed=0):
    source = random.Random(seed)
    words = "the of and a in to it is was I for that you he with on by at are not".split()
    return [f"{n}: " + " ".join(source.choices(words, k=80)) for n in range(count)]


def lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def parquet(texts, rows=50):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), sink, row_group_size=rows, compression="none")
    return sink.getvalue().to_pybytes()


TEXTS = some_texts(600)
FILES = {
    ".gitattributes": b"*.gz filter=lfs\n",
    "README.md": b"# News\n",
    "data/a.jsonl": lines(TEXTS[:200]),
    "data/b.jsonl.gz": gzip.compress(lines(TEXTS[200:400])),
    "data/c.parquet": parquet(TEXTS[400:]),
    "data/de/d [1].txt": b"Eine Nachricht",
}
DATA = [name for name in FILES if name.startswith("data/")]


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub with one data set, for the client in this process; it waits without waiting."""
    fake = FakeHub()
    fake.waits = []
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)
    template = f"{fake.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(time, "sleep", fake.waits.append)
    monkeypatch.setattr(hub, "tell", hub.tell)  # workers put theirs in its place
    fake.sha = fake.commit(REPOSITORY, FILES)
    yield fake
    fake.close()


class Serially:
    """Does the tasks of `prepare` one after the other, in this process."""

    kind, workers = "local", 1

    @classmethod
    def of(cls, flags):
        return cls()

    def run(self, step, tasks, logs):
        for rank in range(tasks):
            step.run(None, rank, tasks)


@pytest.fixture
def call(server, monkeypatch, tmp_path, tokenizer_file, capsys):
    """Runs `prepare` in this process, in small chunks: its exit code and what it printed."""
    monkeypatch.setattr(prepare, "Executor", Serially)
    monkeypatch.setattr(chunks, "_MIN_CHUNK_BYTES", 40_000)
    monkeypatch.setattr(chunks, "_CHUNKS_PER_SOURCE", 10**9)

    def called(*inputs, output=tmp_path):
        flags = ["--source", "s", "--output", str(output), "--tokenizer", tokenizer_file]
        code = prepare.main([*flags, "--input", *map(str, inputs)])
        return code, capsys.readouterr()

    return called


def texts_of(files):
    records = (
        record for chunk in chunks.cut(files) for record in chunks.read_chunk(chunk, Reading())
    )
    return [record.content for record in records]


def shards(directory):
    made = manifest.read_manifest(directory)
    return [info.sha256 for split in (made.train, made.held_out) for info in split.shards]


# what is found


def test_a_branch_is_resolved_once_and_every_path_holds_the_whole_revision(server):
    revisions, left_out = {}, []
    files = find_files([f"{URL}@main"], left_out=left_out, revisions=revisions)
    assert revisions == {f"{REPOSITORY}@main": server.sha}
    assert [file.path for file in files] == [f"{URL}@{server.sha}/{name}" for name in DATA]
    assert [file.size for file in files] == [len(FILES[name]) for name in DATA]
    assert {item.reason for item in left_out} == {"hidden", "the card of its repository"}
    asked = len(server.requests)
    assert find_files([f"{URL}@main"], revisions=revisions) == files
    assert len(server.requests) == asked, "a revision cannot change: it is not listed again"


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/data/*.jsonl*", DATA[:2]),
        ("/data/**/*.txt", DATA[3:]),
        ("/data/de", DATA[3:]),
        ("/data/de/d [1].txt", DATA[3:]),
        ("/README.md", ["README.md"]),
    ],
)
def test_patterns_folders_and_files_are_found_over_all_pages_of_a_listing(server, path, found):
    server.page = 2
    files = find_files([f"{URL}{path}"])
    assert [file.path.partition(f"{server.sha}/")[2] for file in files] == found


def test_a_whole_revision_is_taken_as_it_is_and_a_short_one_is_completed(server):
    server.commit(REPOSITORY, {"data/a.jsonl": b""})  # the branch has moved
    for written in (server.sha, server.sha[:7]):
        revisions = {}
        find_files([f"{URL}@{written}/data/a.jsonl"], revisions=revisions)
        assert revisions == {f"{REPOSITORY}@{written}": server.sha}
    assert server.count(f"/revision/{server.sha[:7]}?") + server.count("/revision/main") == 0


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (f"{URL}@no-branch/data", "nothing there (RevisionNotFound)"),
        (f"{URL}/none/*.gz", "nothing there; check the spelling"),
        (f"{URL}/data/none.gz", "nothing there; check the spelling"),
        (
            "hf://datasets/some/none/data",
            "the Hub refuses with 401, or has no such repository; ask for access at",
        ),
        ("hf://datasets/news", "Repository id must be 'namespace/name'"),
    ],
)
def test_what_is_not_there_is_an_error_at_once(server, written, said):
    with pytest.raises(ValueError) as caught:
        find_files([written])
    assert said in str(caught.value)
    assert not server.waits


def test_a_private_set_names_its_page_and_is_read_with_the_right_token(server, monkeypatch):
    server.private.add(REPOSITORY)
    server.tokens = {"mine": {REPOSITORY}, "other": set()}
    with pytest.raises(
        InputError, match=f"refuses with 401, or .*; ask for access at {PAGE}.* none is"
    ):
        find_files([URL])
    monkeypatch.setenv("HF_TOKEN", "other")
    with pytest.raises(InputError, match=f"RepoNotFound.* ask for access at {PAGE}, and set"):
        find_files([URL])
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(InputError, match=f"refuses with 401; ask for access at {PAGE}"):
        find_files([URL])
    monkeypatch.setenv("HF_TOKEN", "mine")
    assert len(find_files([URL])) == len(DATA)


def test_a_client_that_must_not_ask_says_so(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        find_files([URL])
    assert not server.waits


# what is read


def test_reading_costs_a_request_for_each_file_and_none_for_what_is_listed(server, monkeypatch):
    """N texts of M bytes: N requests. Parquet: one up to 128 MiB, four above."""
    more = {f"more/{n:02}.jsonl.gz": gzip.compress(lines(some_texts(9, n))) for n in range(20)}
    server.commit(REPOSITORY, {**FILES, **more})
    files = find_files([URL])
    del server.requests[:]
    texts = texts_of(files)
    assert texts[:600] == TEXTS and len(texts) == 600 + 1 + 180
    assert server.count("/resolve/") == len(server.requests) == len(files)
    monkeypatch.setattr(streams, "MAX_DOCUMENT_BYTES", 10_000)
    del server.requests[:]
    (table,) = find_files([f"{URL}/data/c.parquet"])
    del server.requests[:]
    assert list(readers.read_file(table, Reading())) == TEXTS[400:]
    assert len(server.requests) <= 4


def test_ranges_of_a_file_meet_and_cost_few_requests(server, monkeypatch):
    monkeypatch.setattr(chunks, "_MIN_CHUNK_BYTES", 20_000)
    monkeypatch.setattr(chunks, "_CHUNKS_PER_SOURCE", 10**9)
    monkeypatch.setattr(hub, "_SKIPPED", 1000)
    files = find_files([f"{URL}/data/a.jsonl", f"{URL}/data/c.parquet"])
    del server.requests[:]
    cut = chunks.cut(files)
    assert len(cut) > 6
    assert len(server.requests) <= 2 * len(files)
    assert texts_of(files) == TEXTS[:200] + TEXTS[400:]
    assert len(server.requests) <= 4 * len(files) + 5 * len(cut)


def test_a_broken_connection_goes_on_where_it_was(server):
    (file,) = find_files([f"{URL}/data/b.jsonl.gz"])
    del server.cdn_requests[:]
    server.cut("b.jsonl.gz", after=3000, times=2)
    server.fail("b.jsonl.gz bytes=3000-", times=1, status=502)
    assert texts_of([file]) == TEXTS[200:400]
    starts = [int(each.split("bytes=")[1].rstrip("-")) for each in server.cdn_requests]
    assert starts == [0, 3000, 3000, 6000]


def test_a_server_that_asks_to_wait_is_waited_for_and_long_waits_are_told(server, capsys):
    limited = {"status": 429, "RateLimit": '"resolvers";r=0;t=56'}
    server.fail("/revision/main", times=1, status=429, Retry_After="3")
    (file,) = find_files([f"{URL}@main/data/b.jsonl.gz"])
    assert server.waits == [4]
    server.fail("/resolve/", times=1, **limited)
    assert not capsys.readouterr().err
    assert texts_of([file]) == TEXTS[200:400]
    assert server.waits == [4, 57]
    assert "waiting until " in (said := capsys.readouterr().err) and file.path in said


def test_failures_of_the_api_are_tried_again(server):
    server.fail("/revision/", times=3, status=503)
    server.fail("/tree/", times=2, status=500)
    assert len(find_files([URL])) == len(DATA)


@pytest.mark.parametrize("name", ["data/b.jsonl.gz", "data/c.parquet"])
def test_a_network_that_fails_for_good_is_no_damage_of_the_file(server, name, monkeypatch):
    monkeypatch.setattr(streams, "MAX_DOCUMENT_BYTES", 10_000)
    monkeypatch.setattr(hub, "_SKIPPED", 1000)
    (file,) = find_files([f"{URL}/{name}"])
    server.cut(name, after=5000 if name.endswith("gz") else 0, times=1)
    server.cut(name, after=0, times=99)
    with pytest.raises(ConnectionError, match=f"{name}: the Hub does not give it"):
        list(readers.read_file(file, Reading()))


def test_a_file_of_another_size_than_listed_is_noticed(server):
    (file,) = find_files([f"{URL}/data/b.jsonl.gz"])
    server.sent["data/b.jsonl.gz"] = FILES["data/b.jsonl.gz"][:-20]
    with pytest.raises(ConnectionError, match=rf"sends \d+ bytes for a file .* with {file.size}"):
        texts_of([file])


def test_a_token_goes_to_the_hub_and_not_to_the_servers_that_it_sends_to(server, monkeypatch):
    server.gated.add(REPOSITORY)
    server.tokens = {"mine": {REPOSITORY}}
    monkeypatch.setenv("HF_TOKEN", "mine")
    assert texts_of(find_files([f"{URL}/data/b.jsonl.gz"])) == TEXTS[200:400]
    assert server.cdn_headers and not any("authorization" in each for each in server.cdn_headers)


# prepare


def test_the_same_revision_is_already_prepared_and_a_branch_that_moved_is_told(
    server, call, tmp_path
):
    code, said = call(f"{URL}/data/*.jsonl*")
    assert code == 0, said.err
    assert f"from the Hub: {URL}@{server.sha}" in said.out
    made = manifest.read_manifest(tmp_path / "s")
    assert made.provenance["revisions"] == {REPOSITORY: server.sha}
    assert made.provenance["inputs"] == [f"{URL}/data/*.jsonl*"]
    server.commit(REPOSITORY, {**FILES, "README.md": b"# Other news\n"})
    for written in (f"{URL}/data/*.jsonl*", f"{URL}@{server.sha}/data/*.jsonl*"):
        code, said = call(written)
        assert code == 0 and "already prepared, 400 documents" in said.out
    now = server.commit(REPOSITORY, {**FILES, "data/a.jsonl": lines(TEXTS[:99])})
    code, said = call(f"{URL}/data/*.jsonl*")
    assert code == 1
    said_of = f"with other files of the Hub, {URL}@{server.sha} (now it is {URL}@{now}): ask for"
    assert said_of in said.err
    assert call(f"{URL}@{server.sha}/data/*.jsonl*")[0] == 0


def test_a_wait_of_a_worker_is_in_the_line_of_the_progress(server, call, monkeypatch):
    watches, said, run = [], [], Serially.run

    class Watched(progress.Watch):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            watches.append(self)

    def limited(self, *arguments):  # not before: the first look reads too
        server.fail("/resolve/", times=1, status=429, RateLimit='"resolvers";r=0;t=20')
        run(self, *arguments)

    monkeypatch.setattr(progress, "Watch", Watched)
    monkeypatch.setattr(Serially, "run", limited)
    monkeypatch.setattr(time, "sleep", lambda seconds: said.append(watches[0].line()))
    assert call(f"{URL}/data/*.gz")[0] == 0
    assert re.search(
        r"; 1 waiting until [\d:]{8}, as the Hub asks: too many requests, hf://", said[0]
    )


@pytest.mark.parametrize("token", ["", "other"])
def test_a_gated_set_ends_before_any_worker_starts(server, call, monkeypatch, token):
    server.gated.add(REPOSITORY)
    server.tokens = {"other": set()}
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(Serially, "run", lambda *_: pytest.fail("it began"))
    code, said = call(f"{URL}/data/*.gz")
    assert code == 2
    (line,) = said.err.splitlines()
    assert f"refuses with {403 if token else 401}; ask for access at {PAGE}" in line
    assert "HF_TOKEN" in line and not server.waits
    assert server.count("/resolve/") == 1


@pytest.fixture
def from_files(call, tmp_path):
    """The shards of the same files on this machine."""
    (local := tmp_path / "files").mkdir()
    for name in DATA[:3]:
        (local / os.path.basename(name)).write_bytes(FILES[name])
    assert call(*sorted(local.iterdir()), output=tmp_path / "local")[0] == 0
    return shards(tmp_path / "local/s")


def written(directory):
    return b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())


def test_what_was_begun_goes_on_at_its_revision_with_the_bytes_of_the_files_and_writes_no_token(
    server, call, from_files, tmp_path, monkeypatch
):
    server.gated.add(REPOSITORY)
    server.tokens = {"hf_mine": {REPOSITORY}}
    monkeypatch.setenv("HF_TOKEN", "hf_mine")

    def stopped(self, step, tasks, logs):
        step.run(None, 0, tasks)
        raise TasksFailed("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Serially, "run", stopped)
        code, begun = call(f"{URL}/data/*.*")
    assert code == 1 and begun.err == "prepare: stopped\n"
    kept = written(tmp_path / "s")
    server.commit(REPOSITORY, {**FILES, "data/a.jsonl": lines(TEXTS[:99])})
    del server.requests[:]
    code, said = call(f"{URL}/data/*.*")
    assert code == 0 and "going on with what was begun" in said.out
    assert shards(tmp_path / "s") == from_files
    assert {each for each in server.requests if "/resolve/" not in each} == set()
    assert b"hf_mine" not in kept + written(tmp_path / "s")
    assert "hf_mine" not in "".join([*begun, *said])


@pytest.mark.by_hand
def test_killed_and_started_again_as_a_process_it_gives_the_bytes_of_the_files(
    server, from_files, tmp_path, tokenizer_file
):
    (tmp_path / "kill").touch()
    command = [
        sys.executable, SMALL_CHUNKS, "--source", "s", "--input", f"{URL}/data/*.*", "--output",
        tmp_path, "--tokenizer", tokenizer_file, "--workers", "2",
    ]  # fmt: skip
    extra = {"PYTHONPATH": ROOT, "CHUNKS_KILL_WORKER": tmp_path / "kill"}
    environment = {**os.environ, **server.environment(), **extra}
    for code in (1, 0):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        # The branch moves in between.
        server.commit(REPOSITORY, {**FILES, "data/a.jsonl": lines(TEXTS[:99])})
    assert "going on with what was begun" in done.stdout
    assert shards(tmp_path / "s") == from_files
    # Each start lists, its workers do not; the branch is resolved once.
    assert server.requests.count(f"GET /api/{REPOSITORY}") == 1
    assert sum(f"/api/{REPOSITORY}/" in each for each in server.requests) <= 2 * 4


# train_tokenizer


def test_a_tokenizer_is_trained_from_the_hub_and_notes_the_revision(server, tmp_path, capsys):
    output = tmp_path / "tokenizer.json"
    flags = ["--input", f"{URL}/data/*.jsonl", "--output", str(output), "--rows", "300"]
    assert train_tokenizer.main(flags) == 0
    notes = json.loads((tmp_path / "tokenizer.training.json").read_text())
    assert notes["revisions"] == {REPOSITORY: server.sha}
    server.commit(REPOSITORY, {"data/a.jsonl": lines(TEXTS[:99])})
    assert train_tokenizer.main(flags) == 1
    assert f"from this input, but from {URL}@{server.sha}: choose" in capsys.readouterr().err
