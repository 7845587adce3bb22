"""What is saved comes back bit for bit; what is damaged, half or of another kind is refused."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stablelm_jax.checkpoint.checksum import flatten
from stablelm_jax.checkpoint.reading import (
    CheckpointError,
    DamagedCheckpoint,
    read_arrays,
    read_run,
)
from stablelm_jax.checkpoint.saving import Checkpoint, write_checkpoint
from stablelm_jax.checkpoint.store import CheckpointStore
from stablelm_jax.parallel.mesh import make_mesh


def random_checkpoint(seed=0, run=None, shape=(8, 16)):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {"layers": {"kernel": jax.random.normal(keys[0], shape)}}
    moments = {"layers": {"kernel": jax.random.normal(keys[1], shape)}}
    v = jax.tree.map(jnp.square, moments)
    optimizer = {"m": moments, "v": v, "count": jnp.int32(seed)}
    return Checkpoint(params, optimizer, run or {"rows_consumed": seed})


def as_abstract(checkpoint):
    def leaf(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    return jax.tree.map(leaf, {"params": checkpoint.params, "optimizer": checkpoint.optimizer})


@pytest.fixture
def written(tmp_path):
    """Writes a checkpoint of step 1; its path."""

    def write(checkpoint):
        path = tmp_path / "checkpoints" / "global_step1"
        path.parent.mkdir()
        write_checkpoint(path, checkpoint)
        return path

    return write


def test_a_checkpoint_comes_back_bit_for_bit_with_its_run_item(written):
    saved = random_checkpoint(3, {"rows_consumed": 24, "text": "ü"})
    path = written(saved)
    run = read_run(path)
    assert run["rows_consumed"] == 24 and run["text"] == "ü" and run["format_version"] == 2
    arrays = read_arrays(path, as_abstract(saved), run)
    expected = {"params": saved.params, "optimizer": saved.optimizer}
    jax.tree.map(np.testing.assert_array_equal, arrays, expected)


def test_a_checkpoint_is_restored_on_another_mesh(written):
    saved = random_checkpoint(1)
    path = written(saved)
    place = NamedSharding(make_mesh(2, 4), P("data", "model"))
    wanted = {"layers": {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=place)}}
    arrays = read_arrays(path, {"params": wanted}, read_run(path))
    kernel = arrays["params"]["layers"]["kernel"]
    assert kernel.sharding == place
    np.testing.assert_array_equal(kernel, saved.params["layers"]["kernel"])


@pytest.mark.parametrize("leaf", ["params/layers/kernel", "optimizer/m/layers/kernel"])
def test_a_flipped_bit_in_a_data_file_is_refused_and_the_leaf_is_named(written, leaf):
    saved = random_checkpoint(2, shape=(64, 64))  # large enough to lie outside Orbax's index
    path = written(saved)
    item = leaf.split("/")[0]
    arrays = flatten({"params": saved.params, "optimizer": saved.optimizer})
    content = np.asarray(arrays[leaf]).tobytes()
    flipped = 0
    for file in (file for file in Path(path / item).rglob("*") if file.is_file()):
        stored = bytearray(file.read_bytes())
        at = stored.find(content)
        if at >= 0:  # each copy, as a restore reads one of them
            stored[at + len(content) // 2] ^= 4
            file.write_bytes(stored)
            flipped += 1
    assert flipped
    with pytest.raises(DamagedCheckpoint, match=f"is damaged: the bits of {leaf}"):
        read_arrays(path, {item: as_abstract(saved)[item]}, read_run(path))


def test_a_changed_digit_in_the_record_is_refused(written):
    path = written(random_checkpoint(run={"rows_consumed": 24}))
    record = path / "run/metadata"
    record.write_text(record.read_text().replace("24", "25"))
    with pytest.raises(DamagedCheckpoint, match="run/metadata does not match its own checksum"):
        read_run(path)


def test_a_path_that_is_no_checkpoint_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "results").mkdir()
    for path in (tmp_path / "results", tmp_path / "global_step5"):
        with pytest.raises(CheckpointError, match="is not a checkpoint; give the path of a folder"):
            read_run(path)


@pytest.mark.parametrize("lost", ["run/metadata", "params/manifest.ocdbt"])
def test_a_missing_file_is_an_error_that_names_the_checkpoint(written, lost):
    saved = random_checkpoint()
    path = written(saved)
    (path / lost).unlink()
    with pytest.raises(CheckpointError, match="global_step1 cannot be read"):
        read_arrays(path, as_abstract(saved), read_run(path))


@pytest.mark.parametrize(
    ("version", "seal", "says"),
    [
        (99, True, "format_version 99, but this program reads 2; use the version"),
        (1, False, "format_version 1, but this program reads 2; use the version"),
        (1, True, "is damaged"),  # a flipped bit: format 1 had no seal
    ],
)
def test_another_format_version_is_refused(written, version, seal, says):
    path = written(random_checkpoint(run={"format_version": version if version > 2 else 2}))
    record = path / "run/metadata"
    run = json.loads(record.read_text())
    run["format_version"] = version
    if not seal:
        del run["seal"]
    record.write_text(json.dumps(run))
    with pytest.raises(CheckpointError, match=says) as refused:
        read_run(path)
    assert isinstance(refused.value, DamagedCheckpoint) == (says == "is damaged")


def test_a_model_of_another_shape_is_refused(written):
    path = written(random_checkpoint())
    wrong = {"params": {"layers": {"kernel": jax.ShapeDtypeStruct((8, 17), jnp.float32)}}}
    with pytest.raises(CheckpointError):
        read_arrays(path, wrong, read_run(path))


def test_an_unfinished_save_is_not_a_checkpoint_and_is_removed(written):
    folder = written(random_checkpoint()).parent
    (folder / "global_step2.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (folder / "global_step3.deleting").mkdir()
    (folder / "global_step4.damaged").mkdir()
    store = CheckpointStore(folder, keep_latest=2)
    assert store.steps() == [1] and store.unfinished == ["global_step2"]
    assert {path.name for path in folder.iterdir()} == {"global_step1", "global_step4.damaged"}


def test_a_checkpoint_that_is_set_aside_keeps_its_bytes_under_a_name_of_its_own(written):
    folder = written(random_checkpoint()).parent
    (folder / "global_step1.damaged").mkdir()
    store = CheckpointStore(folder, keep_latest=2)
    assert store.set_aside(1) == "global_step1.damaged2"
    assert store.steps() == [] and (folder / "global_step1.damaged2/run/metadata").exists()


def test_the_latest_and_every_keep_every_th_stay_and_what_is_kept_by_name(tmp_path):
    store = CheckpointStore(tmp_path, keep_latest=2, keep_every=100)
    store.keep(50)
    for step in (50, 100, 150, 200, 250, 300):
        (tmp_path / f"global_step{step}").mkdir()
        store.add(step)
    assert store.steps() == [50, 100, 200, 250, 300]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"global_step{step}" for step in store.steps()
    )
