from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stablelm_jax.checkpoint.reading import CheckpointError, read_arrays, read_run
from stablelm_jax.checkpoint.store import Checkpoint, CheckpointStore
from stablelm_jax.parallel.mesh import make_mesh


def random_checkpoint(seed=0, run=None):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {"layers": {"kernel": jax.random.normal(keys[0], (8, 16))}}
    moments = {"layers": {"kernel": jax.random.normal(keys[1], (8, 16))}}
    optimizer = {"m": moments, "v": moments, "count": jnp.int32(seed)}
    return Checkpoint(params, optimizer, run or {"rows_consumed": seed})


def as_abstract(checkpoint):
    def leaf(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    return jax.tree.map(leaf, {"params": checkpoint.params, "optimizer": checkpoint.optimizer})


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep_latest=2, keep_every=100)
    yield store
    store.close()


def test_a_checkpoint_comes_back_bit_for_bit_with_its_run_item(store):
    saved = random_checkpoint(3, {"rows_consumed": 24, "text": "ü"})
    store.save(7, saved)
    store.wait()
    path = store.folder / "global_step7"
    run = read_run(path)
    assert run["rows_consumed"] == 24 and run["text"] == "ü" and run["format_version"] == 2
    arrays = read_arrays(path, as_abstract(saved), run)
    expected = {"params": saved.params, "optimizer": saved.optimizer}
    jax.tree.map(np.testing.assert_array_equal, arrays, expected)


def test_donating_the_arrays_right_after_save_does_not_change_what_is_stored(store):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    saved = random_checkpoint(5)
    copy = jax.device_get(saved.params)
    store.save(1, saved)
    step(saved.params)
    store.wait()
    path = store.folder / "global_step1"
    like = random_checkpoint(5)
    arrays = read_arrays(path, {"params": as_abstract(like)["params"]}, read_run(path))
    jax.tree.map(np.testing.assert_array_equal, arrays["params"], copy)


def test_a_checkpoint_is_restored_on_another_mesh(store):
    saved = random_checkpoint(1)
    store.save(1, saved)
    store.wait()
    path = store.folder / "global_step1"
    place = NamedSharding(make_mesh(2, 4), P("data", "model"))
    wanted = {"layers": {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=place)}}
    arrays = read_arrays(path, {"params": wanted}, read_run(path))
    kernel = arrays["params"]["layers"]["kernel"]
    assert kernel.sharding == place
    np.testing.assert_array_equal(kernel, saved.params["layers"]["kernel"])


def test_the_latest_and_every_keep_every_th_stay(store):
    for step in (50, 100, 150, 200, 250, 300):
        store.save(step, random_checkpoint(step))
    store.wait()
    assert store.steps() == [100, 200, 250, 300]


def test_a_changed_byte_is_noticed_and_the_leaf_is_named(store):
    saved = random_checkpoint(2)
    store.save(1, saved)
    store.wait()
    run = read_run(store.folder / "global_step1")
    run["checksums"]["optimizer/m/layers/kernel"] ^= 1
    with pytest.raises(CheckpointError, match="is damaged: the bits of optimizer/m/layers/kernel"):
        read_arrays(store.folder / "global_step1", as_abstract(saved), run)


def test_a_flipped_bit_in_a_data_file_is_refused(store):
    saved = random_checkpoint(2)
    store.save(1, saved)
    store.wait()
    path = store.folder / "global_step1"
    run = read_run(path)
    files = Path(path / "params").rglob("d/*")
    largest = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)
    with pytest.raises(CheckpointError):
        read_arrays(path, {"params": as_abstract(saved)["params"]}, run)


def test_a_path_that_is_no_checkpoint_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "results").mkdir()
    for path in (tmp_path / "results", tmp_path / "global_step5"):
        with pytest.raises(CheckpointError, match="is not a checkpoint; give the path of a folder"):
            read_run(path)


def test_an_unfinished_save_is_not_a_checkpoint(store):
    store.save(1, random_checkpoint())
    store.wait()
    unfinished = store.folder / "global_step2.orbax-checkpoint-tmp"
    (unfinished / "params").mkdir(parents=True)
    again = CheckpointStore(store.folder, keep_latest=2)
    assert again.steps() == [1] and again.unfinished == ["global_step2"]
    assert not unfinished.exists()


@pytest.mark.parametrize("lost", ["run/metadata", "params/manifest.ocdbt"])
def test_a_missing_file_is_an_error_that_names_the_checkpoint(store, lost):
    saved = random_checkpoint()
    store.save(1, saved)
    store.wait()
    path = store.folder / "global_step1"
    (path / lost).unlink()
    with pytest.raises(CheckpointError, match="global_step1 cannot be read"):
        read_arrays(path, as_abstract(saved), read_run(path))


def test_another_format_version_is_refused(store):
    store.save(1, random_checkpoint(run={"format_version": 99}))
    store.wait()
    with pytest.raises(CheckpointError, match="format_version 99, but this program reads up to 2"):
        read_run(store.folder / "global_step1")


def test_a_model_of_another_shape_is_refused(store):
    store.save(1, random_checkpoint())
    store.wait()
    path = store.folder / "global_step1"
    wrong = {"params": {"layers": {"kernel": jax.ShapeDtypeStruct((8, 17), jnp.float32)}}}
    with pytest.raises(CheckpointError):
        read_arrays(path, wrong, read_run(path))
