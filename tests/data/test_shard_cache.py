"""Data behind a URL: the same rows, checked shards, a bounded cache, and a network that fails."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from prepared import EOD, TOKENIZER, mixture_of, random_documents, write_source

from stablelm_jax.data.batches import BatchSpec, packed_batches, train_batches
from stablelm_jax.data.manifest import ManifestError, data_hash, open_sources
from stablelm_jax.data.packing import PackedSources
from stablelm_jax.data.rows import SourceRows, token_stream
from stablelm_jax.data.shard_cache import ShardCache
from stablelm_jax.data.shards import ShardError
from stablelm_jax.storage import remote

NAMES = ("arxiv", "books")
PLENTY = 10**9


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    monkeypatch.setattr(remote, "_WAITS", (0.0,) * 4)


@pytest.fixture
def local(tmp_path):
    """Two sources of three shards each."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    for name in NAMES:
        shards = [random_documents(rng, 20, 30) for _ in range(3)]
        write_source(root, name, shards, held_out=random_documents(rng, 5, 30))
    return root


def upload(root: Path, url: str) -> str:
    fs, path = fsspec.core.url_to_fs(url)
    for file in root.rglob("*.*"):
        fs.pipe_file(f"{path}/{file.relative_to(root)}", file.read_bytes())
    return url


@pytest.fixture
def memory(local):
    url = upload(local, "memory://data")
    yield url
    fsspec.filesystem("memory").rm("/data", recursive=True)


@pytest.fixture
def stored(local, gcs):
    """The sources in a bucket of this test."""
    gcs.objects.clear()
    gcs.requests.clear()
    return upload(local, "gs://data-bucket/some/data")


def opened(root, tmp_path, max_bytes=PLENTY):
    return open_sources(root, NAMES, cache=ShardCache(tmp_path / "cache", max_bytes))


def cached(tmp_path) -> dict[str, int]:
    return {path.stem: path.stat().st_size for path in (tmp_path / "cache").glob("*.bin")}


def size_of(source) -> int:
    return sum(info.bytes for info in source.manifest.train.shards)


def assert_same_rows(one, other):
    for name in NAMES:
        rows, expected = SourceRows(one[name], 16, 0), SourceRows(other[name], 16, 0)
        assert len(rows) == len(expected) > 10
        for number in range(len(rows)):
            assert rows.tokens(number).dtype == np.int32
            np.testing.assert_array_equal(rows.tokens(number), expected.tokens(number))
        held, of = token_stream(one[name], "held_out"), token_stream(other[name], "held_out")
        np.testing.assert_array_equal(held.read(0, held.num_tokens), of.read(0, of.num_tokens))


@pytest.mark.parametrize("max_bytes", [0, PLENTY])
@pytest.mark.parametrize("store", ["memory", "stored"])
def test_rows_are_those_of_local_files_by_range_and_whole(
    local, tmp_path, request, store, max_bytes
):
    sources = opened(request.getfixturevalue(store), tmp_path, max_bytes)
    here = open_sources(local, NAMES)
    assert_same_rows(sources, here)
    assert len(cached(tmp_path)) == (8 if max_bytes else 0)
    manifests = [{n: s.manifest for n, s in some.items()} for some in (sources, here)]
    assert data_hash(manifests[0]) == data_hash(manifests[1])


@pytest.mark.parametrize("max_bytes", [0, PLENTY])
def test_packed_rows_behind_a_url_are_those_of_local_files(tmp_path, max_bytes):
    rng, names = np.random.default_rng(1), ("arxiv", "chats")
    shards = [random_documents(rng, 20, 15) for _ in range(2)]
    write_source(tmp_path / "data", "arxiv", shards, shards[0])
    answers = {
        "kind": "conversations",
        "spans": lambda document: [(len(document) // 2, len(document))],
    }
    write_source(tmp_path / "data", "chats", shards, shards[0], **answers)
    url, spec = (
        upload(tmp_path / "data", "memory://packed"),
        BatchSpec(16, 4, 0, EOD, True, "best_fit"),
    )
    here = PackedSources(open_sources(tmp_path / "data", names), spec)
    there = open_sources(url, names, cache=ShardCache(tmp_path / "cache", max_bytes))
    packed = PackedSources(there, spec)
    for name in names:
        pairs = zip(*(packed_batches(p, name, "train", spec) for p in (packed, here)), strict=True)
        for one, other in pairs:
            for key in one:
                np.testing.assert_array_equal(one[key], other[key])
    fs = fsspec.filesystem("memory")
    index = fs.cat_file("/packed/chats/train-00001.idx")
    for data, message in ((index[:-8], "bytes where its header asks"), (None, "missing; restore")):
        fs.rm("/packed/chats/train-00001.idx")
        if data is not None:
            fs.pipe_file("/packed/chats/train-00001.idx", data)
        with pytest.raises(ShardError, match=f"memory://packed/chats/train-00001.idx: .*{message}"):
            PackedSources(there, spec)
    fs.rm("/packed", recursive=True)


def test_batches_made_by_several_threads_are_those_of_local_files(local, stored, tmp_path):
    mixture, spec = mixture_of({"arxiv": 0.5, "books": 0.5}), BatchSpec(16, 4, 0, EOD)
    bound = size_of(open_sources(local, NAMES)["books"])  # some shards whole, others by range
    with (
        contextlib.closing(
            train_batches(opened(stored, tmp_path, bound), mixture, spec, prefetch=8)
        ) as ours,
        contextlib.closing(train_batches(open_sources(local, NAMES), mixture, spec)) as theirs,
    ):
        for _ in range(20):
            one, other = next(ours), next(theirs)
            assert all((one[key] == other[key]).all() for key in other)
    assert 0 < len(cached(tmp_path)) < 6


def test_opening_asks_for_a_listing_and_a_manifest_a_source_and_no_shard(stored, gcs, tmp_path):
    gcs.requests.clear()
    opened(stored, tmp_path)
    assert len(gcs.requests) <= 4 * len(NAMES)
    assert not any(".bin" in request for request in gcs.requests)


def test_a_shard_is_fetched_once_and_then_read_from_this_machine(stored, gcs, tmp_path):
    def read():
        source = opened(stored, tmp_path)["books"]
        gcs.requests.clear()
        stream = token_stream(source, "train")
        return stream.read(0, stream.num_tokens)

    first = read()
    assert any(".bin" in request for request in gcs.requests)
    np.testing.assert_array_equal(read(), first)
    assert not any(".bin" in request for request in gcs.requests)


def test_a_store_that_answers_503_twice_is_asked_again(local, stored, gcs, tmp_path):
    gcs.fail("train-00001.bin?alt=media", 2)
    assert_same_rows(opened(stored, tmp_path), open_sources(local, NAMES))
    assert gcs.faults_left() == 0


@pytest.mark.parametrize("max_bytes", [0, PLENTY])
def test_what_a_driver_gives_up_on_is_asked_again(local, memory, tmp_path, monkeypatch, max_bytes):
    fs = fsspec.filesystem("memory")
    left = {name: 2 for name in ("ls", "cat_file", "get_file")}

    def failing(name, real):
        def call(*arguments, **options):
            if left[name]:
                left[name] -= 1
                raise ConnectionResetError("gone")
            return real(*arguments, **options)

        return call

    for name in left:
        monkeypatch.setattr(fs, name, failing(name, getattr(fs, name)))
    assert_same_rows(opened(memory, tmp_path, max_bytes), open_sources(local, NAMES))
    assert left["ls"] == left["cat_file"] == 0 and left["get_file"] == (0 if max_bytes else 2)


def test_an_error_that_lasts_ends_with_the_shard_and_what_the_driver_said(memory, monkeypatch):
    calls = []

    def cat_file(path, **span):
        calls.append(span)
        raise TimeoutError("no answer")

    source = open_sources(memory, NAMES)["books"]
    monkeypatch.setattr(source.directory.fs, "cat_file", cat_file)
    with pytest.raises(ShardError, match="failed 5 times, TimeoutError: no answer") as caught:
        token_stream(source, "train").read(0, 5)
    assert f"{memory}/books/train-00000.bin" in str(caught.value)
    assert len(calls) == 5


def damage(root: str, file: str, change) -> str:
    fs, path = fsspec.core.url_to_fs(f"{root}/books/{file}")
    fs.pipe_file(path, change(fs.cat_file(path)))
    return f"{root}/books/{file}"


def flip(data: bytes) -> bytes:
    return data[:40] + bytes([data[40] ^ 1]) + data[41:]


@pytest.mark.parametrize("store", ["memory", "stored"])
def test_a_flipped_bit_is_refused_with_shard_expected_and_found(tmp_path, request, store):
    root = request.getfixturevalue(store)
    url = damage(root, "train-00001.bin", flip)
    source = opened(root, tmp_path)["books"]
    stream = token_stream(source, "train")
    expected = source.manifest.train.shards[1].sha256
    with pytest.raises(ShardError, match=f"sha256 [0-9a-f]{{64}} where .* {expected}") as caught:
        stream.read(0, stream.num_tokens)
    assert url in str(caught.value)
    assert len(cached(tmp_path)) == 1 and not list((tmp_path / "cache").glob("*.partial"))


def test_a_shard_of_another_size_is_refused_at_the_start(memory, tmp_path):
    url = damage(memory, "train-00001.bin", lambda data: data[:-4])
    with pytest.raises(ShardError, match="bytes where the manifest says") as caught:
        opened(memory, tmp_path)
    assert url in str(caught.value)


def test_a_shard_cut_short_after_the_start_is_refused_by_range_too(memory):
    source = open_sources(memory, NAMES)["books"]
    stream = token_stream(source, "train")
    damage(memory, "train-00000.bin", lambda data: data[:40])
    with pytest.raises(ShardError, match="40 bytes came for tokens 0 to 20; the file was cut"):
        stream.read(0, 20)


def test_an_index_is_fetched_once_for_all_documents(memory, monkeypatch):
    source = open_sources(memory, NAMES)["books"]
    shard, _ = token_stream(source, "train").locate(0)
    asked, read = [], remote.RemotePath.read_bytes
    monkeypatch.setattr(
        remote.RemotePath, "read_bytes", lambda self: asked.append(self.name) or read(self)
    )
    assert shard.document_offsets.tolist() == shard.document_offsets.tolist()
    assert asked == [shard.path.name.replace(".bin", ".idx")]


def test_a_store_that_knows_no_ranges_is_an_error_and_not_other_rows(memory, monkeypatch):
    source = open_sources(memory, NAMES)["books"]
    fs = source.directory.fs
    whole = fs.cat_file
    monkeypatch.setattr(fs, "cat_file", lambda path, start=None, end=None: whole(path))
    with pytest.raises(ShardError, match="does not read by range; raise data.cache_gb"):
        token_stream(source, "train").read(0, 20)


def test_missing_things_are_named(memory, tmp_path):
    fs = fsspec.filesystem("memory")
    fs.rm("/data/books/train-00001.bin")
    with pytest.raises(ShardError, match="memory://data/books/train-00001.bin: missing"):
        opened(memory, tmp_path)
    fs.rm("/data/books/manifest.json")
    with pytest.raises(ManifestError, match="memory://data/books/manifest.json: missing; prepare"):
        opened(memory, tmp_path)


def test_a_url_without_a_driver_says_so():
    with pytest.raises(ValueError, match="nosuch://data"):
        open_sources("nosuch://data", NAMES)


def test_the_cache_keeps_to_its_bound_and_the_rest_is_read_by_range(local, memory, tmp_path):
    here = open_sources(local, NAMES)
    bound = size_of(here["books"]) + 8
    assert_same_rows(opened(memory, tmp_path, bound), here)
    assert 0 < sum(cached(tmp_path).values()) <= bound


def test_the_least_recently_used_shards_of_ended_runs_give_way(local, memory, tmp_path):
    sizes = [size_of(source) for source in open_sources(local, NAMES).values()]
    bound = sum(sizes) - 1  # one shard has to go

    def read_all(name):
        source = opened(memory, tmp_path, bound)[name]
        stream = token_stream(source, "train")
        stream.read(0, stream.num_tokens)
        return {info.sha256 for info in source.manifest.train.shards}

    books = read_all("books")
    assert set(cached(tmp_path)) == books
    for age, sha256 in enumerate(sorted(books)):  # the last of them is the oldest
        os.utime(tmp_path / "cache" / f"{sha256}.bin", ns=(0, 10**15 - age))
    arxiv = read_all("arxiv")
    assert set(cached(tmp_path)) == arxiv | set(sorted(books)[:-1])
    assert sum(cached(tmp_path).values()) <= bound


READER = """
import sys
from stablelm_jax.data.manifest import open_sources
from stablelm_jax.data.packing import PackedSources
from stablelm_jax.data.rows import token_stream
from stablelm_jax.data.shard_cache import ShardCache
root, folder, bound = sys.argv[1:]
source = open_sources(root, ["books"], cache=ShardCache(folder, int(bound)))["books"]
stream = token_stream(source, "train")
print(stream.read(0, stream.num_tokens).sum(), flush=True)
sys.stdin.readline()
print(stream.read(0, stream.num_tokens).sum(), flush=True)
"""


def reader(root, folder, bound):
    command = [sys.executable, "-c", READER, root, str(folder), str(bound)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_processes_share_what_is_there_and_each_reads_on_what_another_removed(
    local, stored, gcs, tmp_path
):
    here = open_sources(local, NAMES)
    bound = size_of(here["books"]) + 8
    gcs.requests.clear()
    readers = [reader(stored, tmp_path / "cache", bound) for _ in range(2)]
    stream = token_stream(here["books"], "train")
    total = str(stream.read(0, stream.num_tokens).sum())
    for process in readers:
        assert process.stdout.readline().strip() == total
    for number in range(3):  # fetched once between them
        fetched = [r for r in gcs.requests if f"train-0000{number}.bin?alt=media" in r]
        assert len(fetched) == 1
    books = {info.sha256 for info in here["books"].manifest.train.shards}
    assert set(cached(tmp_path)) == books
    arxiv = token_stream(opened(stored, tmp_path, bound)["arxiv"], "train")
    arxiv.read(0, arxiv.num_tokens)
    assert books - set(cached(tmp_path))  # some had to go
    for process in readers:
        out, err = process.communicate("again\n")
        assert out.strip() == total, err


def test_many_threads_fetch_a_shard_once(stored, gcs, tmp_path):
    stream = token_stream(opened(stored, tmp_path)["books"], "train")
    gcs.requests.clear()
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda _: stream.read(0, 20).tolist(), range(32)))
    assert all(part == parts[0] for part in parts)
    assert sum(".bin?alt=media" in request for request in gcs.requests) == 1


def test_half_a_file_of_a_killed_process_gives_way(memory, tmp_path):
    source = opened(memory, tmp_path)["books"]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{'0' * 64}.bin.partial").write_bytes(b"x" * 100)
    source = opened(memory, tmp_path, size_of(source))["books"]
    stream = token_stream(source, "train")
    stream.read(0, stream.num_tokens)
    assert len(cached(tmp_path)) == 3 and not list((tmp_path / "cache").glob("*.partial"))


def test_half_a_file_of_a_killed_process_is_fetched_again(memory, tmp_path):
    source = opened(memory, tmp_path)["books"]
    info = source.manifest.train.shards[0]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{info.sha256}.bin.partial").write_bytes(b"x" * (info.bytes + 100))
    token_stream(source, "train").read(0, 5)
    assert cached(tmp_path) == {info.sha256: info.bytes}


def test_tokens_of_another_type_are_refused(memory):
    fs = fsspec.filesystem("memory")
    text = fs.cat_file("/data/books/manifest.json").decode()
    info = open_sources(memory, NAMES)["books"].manifest.train.shards[0]
    text = text.replace(f'"bytes": {info.bytes}', f'"bytes": {info.bytes // 2}', 1)
    fs.pipe_file("/data/books/manifest.json", text.encode())
    with pytest.raises(ShardError, match="only shards of int32"):
        open_sources(memory, NAMES, tokenizer=TOKENIZER)
