"""Damaged checkpoints: recognised, named, stepped over; never loaded as if nothing were wrong."""

import collections
import random
import shutil

import jax
import numpy as np
import pytest
from tiny import bare_config, events, losses, train

from stablelm_jax.checkpoint.checksum import checksums
from stablelm_jax.checkpoint.reading import CheckpointError, read_arrays, read_run
from stablelm_jax.checkpoint.saving import write_checkpoint
from stablelm_jax.model.parameters import flatten
from stablelm_jax.training.begin import ResumeOptions
from stablelm_jax.training.run import run_training


def state(seed=0):
    rng = np.random.default_rng(seed)
    leaves = {f"leaf{n}": rng.normal(size=(40, 8 + n)).astype(np.float32) for n in range(4)}
    scale = leaves["leaf0"][0]
    params = jax.tree.map(jax.numpy.asarray, {"layers": leaves, "norm": {"scale": scale}})
    moments = jax.tree.map(lambda x: x * 3, params)
    optimizer = {"m": moments, "v": moments, "count": jax.numpy.int32(7)}
    return {"params": params, "optimizer": optimizer}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A whole checkpoint and what it holds."""
    path = tmp_path_factory.mktemp("whole") / "global_step1"
    arrays = state()
    write_checkpoint(path, arrays, {"step": 1})
    return path, arrays


def restored(path, arrays):
    """The bits of the checkpoint by leaf, or None where it is refused."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arrays)
    try:
        return jax.device_get(read_arrays(path, like, read_run(path)))
    except CheckpointError as error:
        assert str(path) in str(error)
        return None


def same(found, arrays):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(jax.device_get(arrays)), strict=True)
    return all(a.tobytes() == b.tobytes() for a, b in pairs)


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def flips_caught(saved, number, seed):
    """How many of `number` flips are refused; a leaf's bytes are sought among the files."""
    path, arrays = saved
    rng = random.Random(seed)
    files = [f for f in path.rglob("*") if f.is_file()]
    leaves = {k: np.asarray(v).tobytes() for k, v in flatten(arrays).items()}
    places = []
    for name, data in leaves.items():
        for file in files:
            at = file.read_bytes().find(data)
            if at >= 0:
                places.append((name, file, at, len(data)))
    assert len({name for name, *_ in places}) >= 12  # of 16: small ones lie within the index
    caught = 0
    for _ in range(2 * number):
        name, file, at, length = rng.choice(places)
        bit = 8 * at + rng.randrange(8 * length)
        flip(file, bit)
        found = restored(path, arrays)
        flip(file, bit)
        # Small leaves lie in several files, of which a restore reads one.
        assert found is None or same(found, arrays), f"a flipped bit of {name} was loaded"
        caught += found is None
        if caught == number:
            break
    assert same(restored(path, arrays), arrays)
    return caught


def test_a_flipped_bit_of_a_stored_leaf_is_caught(saved):
    assert flips_caught(saved, 12, seed=1) == 12


@pytest.mark.by_hand
def test_a_hundred_flipped_bits_of_stored_leaves_are_caught(saved):
    assert flips_caught(saved, 100, seed=0) == 100


def test_a_flipped_bit_of_any_leaf_changes_its_checksum_and_no_other(saved):
    arrays = flatten(saved[1])
    before = checksums(saved[1])
    rng = random.Random(0)
    for _ in range(100):
        name = rng.choice(list(arrays))
        changed = np.array(arrays[name])
        bits = changed.reshape(-1).view(np.uint32)
        bits[rng.randrange(bits.size)] ^= np.uint32(1 << rng.randrange(32))
        one = {name: jax.numpy.asarray(changed)}
        assert checksums(one)[name] != before[name]


def damage(file, how, rng):
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif content:
        flip(file, rng.randrange(8 * len(content)))
    return content


def outcomes(saved, trials, seed):
    """{(how, outcome): how often} of damage to any file; a different state would be an error."""
    path, arrays = saved
    rng = random.Random(seed)
    files = sorted(f for f in path.rglob("*") if f.is_file())
    counts = collections.Counter()
    for file, how in trials(files, rng):
        content = damage(file, how, rng)
        found = restored(path, arrays)
        assert found is None or same(found, arrays), f"{how} {file}: another state was loaded"
        counts[how, "refused" if found is None else "loaded, equal"] += 1
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return counts


KINDS = ("missing", "truncated", "flipped")


def test_no_damage_to_any_file_gives_another_state(saved):
    def some(files, rng):
        return [(rng.choice(files), rng.choice(KINDS)) for _ in range(12)]

    assert sum(outcomes(saved, some, seed=1).values()) == 12


@pytest.mark.by_hand
def test_no_damage_to_any_file_gives_another_state_each_file_in_each_way(saved):
    def every(files, rng):
        whole = [(file, how) for file in files for how in KINDS]
        return whole + [(rng.choice(files), "flipped") for _ in range(300)]

    counts = outcomes(saved, every, seed=0)
    print(dict(counts))
    assert counts["missing", "refused"] and counts["truncated", "refused"]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run with checkpoints after 0, 4, 8 and 12 steps."""
    workdir = tmp_path_factory.mktemp("run")
    config = bare_config(data, **{"checkpoint.keep_latest": 9})
    return workdir, config, train(config, workdir)[1]


def test_damaged_checkpoints_are_named_set_aside_and_the_newest_whole_one_taken(run, tmp_path):
    workdir, config, lines = run
    shutil.copytree(workdir, tmp_path / "run")
    folder = tmp_path / "run/checkpoints"
    flip(max((folder / "global_step12").rglob("d/*"), key=lambda f: f.stat().st_size), 8 * 3000)
    (folder / "global_step8/run/metadata").write_text('{"step": 8}')
    (folder / "global_step6.orbax-checkpoint-tmp/params").mkdir(parents=True)
    code, again = train(config, tmp_path / "run")
    assert code == 0 and losses(again) == losses(lines)
    told = [event["checkpoint"] for event in events(tmp_path / "run", "damaged_checkpoint")]
    assert told == [str(folder / "global_step12"), str(folder / "global_step8")]
    assert events(tmp_path / "run", "unfinished_checkpoint")[0]["name"] == "global_step6"
    names = {path.name for path in folder.iterdir()}
    assert {"global_step12.damaged", "global_step8.damaged", "global_step12"} <= names
    assert not any("tmp" in name for name in names)
    whole = read_run(workdir / "checkpoints/global_step12")["checksums"]
    assert read_run(folder / "global_step12")["checksums"] == whole


def test_with_strict_a_damaged_newest_checkpoint_is_an_error_and_stays(run, tmp_path):
    workdir, config, _ = run
    shutil.copytree(workdir, tmp_path / "run")
    metadata = tmp_path / "run/checkpoints/global_step12/run/metadata"
    metadata.write_text(metadata.read_text().replace('"step": 12', '"step": 13'))
    with pytest.raises(CheckpointError, match="global_step12 is damaged.*--strict"):
        run_training(config, {}, str(tmp_path / "run"), ResumeOptions(strict=True))
    assert (tmp_path / "run/checkpoints/global_step12").exists()


def test_where_no_checkpoint_can_be_read_the_run_ends_and_touches_none(run, tmp_path):
    workdir, config, _ = run
    shutil.copytree(workdir, tmp_path / "run")
    for path in (tmp_path / "run/checkpoints").iterdir():
        (path / "run/metadata").unlink()
    before = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read.*begin anew"):
        train(config, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == before
