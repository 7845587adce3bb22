"""Samples of shards, by which hosts that read copies of their own find out that these differ."""

import shutil

import fsspec
import numpy as np
import pytest

from stablelm_jax.data import fingerprints
from stablelm_jax.data.fingerprints import check_whole, shard_samples
from stablelm_jax.data.manifest import (
    SourceManifest,
    Split,
    TokenizerInfo,
    open_sources,
    write_manifest,
)
from stablelm_jax.data.shards import ShardError, ShardWriter

TOKENS = 50_000


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A source `a` of two train shards and a small held-out one."""
    root = tmp_path_factory.mktemp("data")
    (root / "a").mkdir()
    rng = np.random.default_rng(5)
    infos = {}
    for name, size in (("train-0", TOKENS), ("train-1", TOKENS), ("held_out-0", 7)):
        with ShardWriter(root / "a" / name) as writer:
            writer.add_many(rng.integers(0, 99, size, np.int32), [size])
            infos[name] = writer.close()
    train = Split.of([infos["train-0"], infos["train-1"]], 4)
    tokenizer = TokenizerInfo("t", "0" * 64, 128, 0)
    held_out = Split.of([infos["held_out-0"]], 4)
    manifest = SourceManifest("a", tokenizer, train, held_out, unigram_entropy=1.0)
    write_manifest(root / "a", manifest)
    return root


@pytest.fixture
def copy(root, tmp_path):
    return shutil.copytree(root, tmp_path / "copy")


def change(copy, name, function):
    path = copy / "a" / f"{name}.bin"
    tokens = np.fromfile(path, "<i4")
    function(tokens).astype("<i4").tofile(path)


def zeros_from(start, stop):
    def damage(tokens):
        tokens[start:stop] = 0
        return tokens

    return damage


@pytest.fixture
def large(monkeypatch):
    """The shards here count as large: of such, blocks are read."""
    monkeypatch.setattr(fingerprints, "_WHOLE_TOKENS", 100)


def test_of_a_small_shard_every_token_counts(root, copy):
    change(copy, "train-1", zeros_from(TOKENS // 3, TOKENS // 3 + 1))
    here, there = shard_samples(open_sources(root, ["a"])), shard_samples(open_sources(copy, ["a"]))
    assert [key for key in here if here[key] != there[key]] == ["a/train-1.bin"]


def test_equal_copies_have_equal_samples(root, copy, large):
    samples = shard_samples(open_sources(root, ["a"]))
    assert samples == shard_samples(open_sources(copy, ["a"]))
    assert list(samples) == ["a", "a/train-0.bin", "a/train-1.bin", "a/held_out-0.bin"]


@pytest.mark.parametrize(
    "name, damage",
    [
        ("train-1", lambda tokens: tokens[::-1]),
        ("train-0", zeros_from(0, 10)),
        ("train-0", zeros_from(TOKENS - 1, TOKENS)),
        ("train-1", zeros_from(TOKENS // 2, TOKENS)),  # a copy that did not come to its end
        ("train-1", zeros_from(TOKENS // 3, 2 * TOKENS // 3)),
        ("held_out-0", lambda tokens: tokens + 1),
    ],
)
def test_other_bytes_of_the_same_size_give_the_shard_another_sample(
    root, copy, large, name, damage
):
    change(copy, name, damage)
    sources = open_sources(copy, ["a"])  # manifest and sizes are as they should be
    here, there = shard_samples(open_sources(root, ["a"])), shard_samples(sources)
    assert [key for key in here if here[key] != there[key]] == [f"a/{name}.bin"]
    check_whole(sources, ["a"])
    with pytest.raises(ShardError, match=rf"{name}\.bin: sha256 .* where the manifest says"):
        check_whole(sources, [f"a/{name}.bin"])


def test_another_manifest_gives_the_source_another_sample(root, copy):
    path = copy / "a" / "manifest.json"
    sha256 = open_sources(root, ["a"])["a"].manifest.train.shards[0].sha256
    path.write_text(path.read_text(encoding="utf-8").replace(sha256, "1" * 64), encoding="utf-8")
    here, there = shard_samples(open_sources(root, ["a"])), shard_samples(open_sources(copy, ["a"]))
    assert [key for key in here if here[key] != there[key]] == ["a"]


def test_shards_behind_a_url_have_the_same_samples_and_are_not_fetched(root, large):
    store, bucket = fsspec.filesystem("memory"), "memory://samples"
    store.put(str(root), "/samples", recursive=True)
    try:
        sources = open_sources(bucket, ["a"])
        assert shard_samples(sources) == shard_samples(open_sources(root, ["a"]))
        check_whole(sources, shard_samples(sources))  # nothing is here that could be read whole
    finally:
        store.rm("/samples", recursive=True)
