"""prepare --verify: whatever differs from a manifest or a recipe is named, and all of it."""

import dataclasses
import shutil
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from prepared import EOD, random_documents, write_source
from rich.console import Console

from stablelm_jax import prepare
from stablelm_jax.data import manifest
from stablelm_jax.preparation import verify as verifying
from stablelm_jax.preparation.verify import verify_root


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        shards = [random_documents(rng, 20, 9) for _ in range(2)]
        held_out = [[*range(8, last), EOD] for last in (20, 25, 30)]  # longer than the others
        write_source(tmp_path / "data", name, shards, held_out)
    documents = random_documents(rng, 4, 9)
    write_source(
        tmp_path / "data", "chats", [documents], kind="conversations",
        spans=lambda document: [(0, 1)],
    )  # fmt: skip
    return tmp_path / "data"


def verify(capsys, *arguments):
    code = prepare.main(["--verify", *map(str, arguments)])
    said, error = capsys.readouterr()
    return code, said, error


def test_what_is_as_its_manifest_says_passes(root, capsys):
    (root / "notes").mkdir()  # no source
    (root / "tokenizer.json").touch()
    code, said, error = verify(capsys, root)
    assert (code, error) == (0, "")
    assert "3 sources, 8 shards" in said
    made = manifest.read_manifest(root / "a")
    assert f"{made.train.tokens + made.held_out.tokens:,}" in said


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def recount(folder, **changes):
    """Another count of a shard in the manifest, whose totals agree with it."""
    made = manifest.read_manifest(folder)
    info = dataclasses.replace(made.train.shards[0], **changes)
    train = manifest.Split.of([info, *made.train.shards[1:]], made.train.text_bytes)
    manifest.write_manifest(folder, dataclasses.replace(made, train=train))


DAMAGES = {
    "a byte of a shard": (lambda root: flip(root / "a" / "train-00001.bin"), "sha256"),
    "a byte of an index": (lambda root: flip(root / "a" / "train-00001.idx", 34), "train-00001"),
    "a shard cut": (
        lambda root: (root / "a" / "train-00001.bin").write_bytes(b"1234"),
        "train-00001.bin: 4 bytes",
    ),
    "no shard": (lambda root: (root / "a" / "held_out-00000.bin").unlink(), "held_out-00000.bin"),
    "no index": (lambda root: (root / "a" / "train-00000.idx").unlink(), "train-00000.idx"),
    "spans": (lambda root: flip(root / "chats" / "train-00000.spans.npy"), "spans.npy: sha256"),
    "a count": (lambda root: recount(root / "a", documents=5), "documents where"),
    "no JSON": (lambda root: (root / "a" / "manifest.json").write_text("{"), "JSON"),
    "another name": (lambda root: (root / "a").rename(root / "c"), "of source 'a'"),
    "more shards": (
        lambda root: shutil.copy(root / "a" / "train-00000.bin", root / "a" / "train-00007.bin"),
        "train-00007.bin: no shard of the manifest",
    ),
    "begun": (lambda root: (root / "d" / ".work").mkdir(parents=True), "d/manifest.json: missing"),
}


def test_documents_that_are_held_out_and_trained_on_too_are_counted(tmp_path, capsys, monkeypatch):
    rng = np.random.default_rng(1)
    held_out = [[*rng.integers(8, 64, length).tolist(), EOD] for length in (3, 12, 12, 30)]
    shards = [[[*rng.integers(8, 64, 12).tolist(), EOD] for _ in range(40)] for _ in range(3)]
    write_source(tmp_path, "a", shards, held_out)
    write_source(tmp_path, "b", [held_out], [[8, 8, EOD]])  # another source's are not meant
    assert verify(capsys, tmp_path)[0] == 0
    shutil.rmtree(tmp_path / "a")
    shards[1][7], shards[1][9], shards[2][39] = held_out[1], held_out[3], held_out[1]
    write_source(tmp_path, "a", shards, held_out)
    for block in (1 << 24, 50, 1):
        monkeypatch.setattr(verifying, "_BLOCK_TOKENS", block)
        code, said, _ = verify(capsys, tmp_path)
        assert code == 1 and said.count("differs: ") == 2
        for shard, count in (("train-00001", 2), ("train-00002", 1)):
            assert f"{shard}.bin: documents that its source holds out too: {count}; train" in said


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_difference_is_named_and_fails(root, capsys, damage):
    make, named = DAMAGES[damage]
    make(root)
    code, said, error = verify(capsys, root)
    assert code == 1
    assert named in said
    assert error == "prepare: differences, named above: 1\n"


def test_several_differences_are_all_named(root, capsys):
    flip(root / "a" / "train-00000.bin")
    flip(root / "b" / "train-00001.bin")
    code, said, error = verify(capsys, root, "--workers", 2)
    assert code == 1
    assert said.count("differs: ") == 2
    assert "named above: 2" in error


def test_a_root_behind_a_url_is_read_to_its_last_byte(root, capsys):
    url = "memory://verified"
    fs, path = fsspec.core.url_to_fs(url)
    fs.put(str(root), path, recursive=True)
    assert verify(capsys, url)[0] == 0
    data = bytearray(fs.cat_file(f"{path}/b/train-00000.bin"))
    data[9] ^= 1
    fs.pipe_file(f"{path}/b/train-00000.bin", bytes(data))
    code, said, _ = verify(capsys, url)
    assert code == 1
    assert "b/train-00000.bin: sha256" in said


def test_a_recipe_says_which_sources_are_missing_or_of_another_size(root, capsys):
    made = {name: manifest.read_manifest(root / name) for name in "ab"}
    sizes = {name: each.train.tokens + each.held_out.tokens for name, each in made.items()}
    sources = [
        SimpleNamespace(name="a", tokens_an_epoch=sizes["a"] * 1.05),
        SimpleNamespace(name="b", tokens_an_epoch=sizes["b"] * 2.0),
        SimpleNamespace(name="chats", tokens_an_epoch=0.0),
        SimpleNamespace(name="gone", tokens_an_epoch=1000.0),
    ]
    recipe = SimpleNamespace(sources=sources)
    assert verify_root(str(root), recipe, 1, Console(width=200)) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "gone: missing, and the recipe has it" in said
    assert (
        f"b: {sizes['b']:,} tokens where the recipe reports {2 * sizes['b']:,} an epoch, -50%"
        in said
    )
    assert "not reported" in said
    assert "95%" in said
    recipe.sources = sources[:1]
    assert verify_root(str(root), recipe, 1, Console(width=200)) == 0
    assert "not in the recipe" in capsys.readouterr().out


def test_a_folder_without_sources_is_no_data_root(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "nowhere"):
        code, _, error = verify(capsys, path)
        assert code == 2
        assert error.count("\n") == error.count(str(path)) == 1
        assert f"--verify {path}: " in error
