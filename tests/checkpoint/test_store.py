"""What is saved comes back bit for bit; what is damaged, half or of another kind is refused."""

import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stablelm_jax.checkpoint import saving
from stablelm_jax.checkpoint import store as store_module
from stablelm_jax.checkpoint.reading import (
    CheckpointError,
    DamagedCheckpoint,
    read_arrays,
    read_leaves,
    read_run,
)
from stablelm_jax.checkpoint.saving import write_checkpoint
from stablelm_jax.checkpoint.store import CheckpointStore
from stablelm_jax.model.parameters import flatten
from stablelm_jax.parallel.mesh import make_mesh


def random_checkpoint(seed=0, run=None, shape=(8, 16)):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {"layers": {"kernel": jax.random.normal(keys[0], shape)}}
    moments = {"layers": {"kernel": jax.random.normal(keys[1], shape)}}
    v = jax.tree.map(jnp.square, moments)
    optimizer = {"m": moments, "v": v, "count": jnp.int32(seed)}
    return {"params": params, "optimizer": optimizer}, run or {"rows_consumed": seed}


def as_abstract(arrays):
    def leaf(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    return jax.tree.map(leaf, arrays)


@pytest.fixture
def written(tmp_path):
    """Writes a checkpoint of step 1; its path."""

    def write(checkpoint):
        path = tmp_path / "checkpoints" / "global_step1"
        path.parent.mkdir()
        write_checkpoint(path, *checkpoint)
        return path

    return write


def test_what_was_read_is_updated_where_it_lies_by_the_first_step(written):
    """Else a resumed run would need room for a second state where a fresh one does not."""
    checkpoint = random_checkpoint(shape=(512, 1024))
    path = written(checkpoint)
    arrays = read_arrays(path, as_abstract(checkpoint[0]), read_run(path))
    kernel = arrays["params"]["layers"]["kernel"]
    place = kernel.unsafe_buffer_pointer()
    after = jax.jit(lambda x: x + 1, donate_argnums=0)(kernel)
    assert after.unsafe_buffer_pointer() == place and kernel.is_deleted()


def test_a_checkpoint_comes_back_bit_for_bit_with_its_run_item(written):
    saved = random_checkpoint(3, {"rows_consumed": 24, "text": "ü"})
    path = written(saved)
    run = read_run(path)
    assert run["rows_consumed"] == 24 and run["text"] == "ü" and run["format_version"] == 2
    arrays = read_arrays(path, as_abstract(saved[0]), run)
    jax.tree.map(np.testing.assert_array_equal, arrays, saved[0])


def test_a_checkpoint_is_restored_on_another_mesh(written):
    saved = random_checkpoint(1)
    path = written(saved)
    place = NamedSharding(make_mesh(2, 4), P("data", "model"))
    wanted = {"layers": {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=place)}}
    arrays = read_arrays(path, {"params": wanted}, read_run(path))
    kernel = arrays["params"]["layers"]["kernel"]
    assert kernel.sharding == place
    np.testing.assert_array_equal(kernel, saved[0]["params"]["layers"]["kernel"])


@pytest.mark.parametrize("chunk, compressed", [(256, False), (None, True)])
def test_leaves_in_chunks_and_compressed_ones_of_earlier_versions_come_back(
    written, monkeypatch, chunk, compressed
):
    handler = saving.ocp.PyTreeCheckpointHandler
    as_then = functools.partial(handler, use_compression=compressed)
    monkeypatch.setattr(saving, "_CHUNK", chunk)
    monkeypatch.setattr(saving.ocp, "PyTreeCheckpointHandler", lambda **_: as_then())
    saved = random_checkpoint(4, shape=(64, 24))
    path = written(saved)
    stored = json.loads((path / "params/array_metadatas/process_0").read_text())
    shapes = [leaf["array_metadata"]["chunk_shape"] for leaf in stored["array_metadatas"]]
    assert ([64, 24] in shapes) == compressed
    place = NamedSharding(make_mesh(4, 2), P("data", "model"))
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), saved[0]["params"]
    )
    found = read_arrays(path, {"params": like}, read_run(path))
    jax.tree.map(np.testing.assert_array_equal, found["params"], saved[0]["params"])
    (leaf,) = (x for _, x in read_leaves(path, {"layers/kernel": (64, 24)}, read_run(path)))
    np.testing.assert_array_equal(leaf, saved[0]["params"]["layers"]["kernel"])
    with saving.ocp.Checkpointer(handler()) as reader:  # as Orbax alone finds them
        jax.tree.map(
            np.testing.assert_array_equal, reader.restore(path / "params"), found["params"]
        )


@pytest.mark.parametrize("leaf", ["params/layers/kernel", "optimizer/m/layers/kernel"])
def test_a_flipped_bit_in_a_data_file_is_refused_and_the_leaf_is_named(written, leaf):
    saved = random_checkpoint(2, shape=(64, 64))  # large enough to lie outside Orbax's index
    path = written(saved)
    item = leaf.split("/")[0]
    arrays = flatten(saved[0])
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
        read_arrays(path, {item: as_abstract(saved[0])[item]}, read_run(path))


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
        read_arrays(path, as_abstract(saved[0]), read_run(path))


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


@pytest.fixture
def told():
    """(what is told, the function that takes it as `Events.tell` does)."""
    lines = []
    return lines, lambda event, text: lines.append(f"{event}: {text}")


def moved_with_a_link(path, elsewhere):
    """Moves a checkpoint to another disk, so to say, and leaves a link; where it is now."""
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    return elsewhere


def test_of_a_checkpoint_that_was_moved_only_the_link_is_deleted(tmp_path, told):
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        (folder / f"global_step{step}").mkdir(parents=True)
    moved = moved_with_a_link(folder / "global_step1", tmp_path / "kept")
    (moved / "file").touch()
    lost = moved_with_a_link(folder / "global_step2", tmp_path / "lost")
    lost.rmdir()
    (folder / "global_step0").touch()  # a pointer to a checkpoint, as archives leave one
    # As an earlier version left one:
    (folder / "global_step0.deleting").symlink_to(moved)
    store = CheckpointStore(folder, keep_latest=1, tell=told[1])
    assert store.steps() == [0, 1, 2, 3] and not os.path.lexists(folder / "global_step0.deleting")
    store.add(3)
    assert [path.name for path in folder.iterdir()] == ["global_step3"]
    assert (moved / "file").exists() and told[0] == []


def test_a_moved_checkpoint_is_read_where_it_is(written, tmp_path):
    saved = random_checkpoint(5)
    path = written(saved)
    moved_with_a_link(path, tmp_path / "elsewhere")
    run = read_run(path)
    assert run["rows_consumed"] == 5
    arrays = read_arrays(path, as_abstract(saved[0]), run)
    np.testing.assert_array_equal(
        arrays["params"]["layers"]["kernel"], saved[0]["params"]["layers"]["kernel"]
    )


@pytest.mark.parametrize("lost", ["a link to .*gone, which is not there", "a file"])
def test_what_is_no_folder_any_more_is_a_damaged_checkpoint_and_can_be_set_aside(tmp_path, lost):
    path = tmp_path / "global_step8"
    path.touch() if lost == "a file" else path.symlink_to(tmp_path / "gone")
    with pytest.raises(DamagedCheckpoint, match=f"global_step8 is {lost}"):
        read_run(path)
    store = CheckpointStore(tmp_path, keep_latest=2)
    assert store.steps() == [8] and store.unfinished == []
    assert store.set_aside(8) == "global_step8.damaged"
    assert os.path.lexists(tmp_path / "global_step8.damaged") and not os.path.lexists(path)


def test_the_folder_of_checkpoints_may_be_a_link_but_not_to_nowhere(written, tmp_path):
    folder = written(random_checkpoint()).parent
    link = tmp_path / "run" / "checkpoints"
    link.parent.mkdir()
    link.symlink_to(folder)
    assert CheckpointStore(link, keep_latest=2).steps() == [1]
    link.unlink()
    link.symlink_to(tmp_path / "not_mounted")
    with pytest.raises(ValueError, match="not_mounted, which is not there; .*not mounted"):
        CheckpointStore(link, keep_latest=2)


def test_tidying_up_stops_neither_a_start_nor_a_run(tmp_path, told, monkeypatch):
    for name in ("global_step1", "global_step2", "global_step3.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(store_module, "_remove", refuse)
    store = CheckpointStore(tmp_path, keep_latest=1, tell=told[1])
    store.add(2)
    assert store.steps() == [2] and store.unfinished == []
    assert [line.partition(" (")[0] for line in told[0]] == [
        f"not_tidied: {tmp_path}/global_step3.orbax-checkpoint-tmp was not removed",
        f"not_tidied: {tmp_path}/global_step1 was not deleted",
    ]


def test_older_checkpoints_stay_until_the_new_one_survives_a_loss_of_power(
    tmp_path, told, monkeypatch
):
    for step in (1, 2):
        (tmp_path / f"global_step{step}").mkdir()

    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(store_module, "flush_to_disk", fail)
    store = CheckpointStore(tmp_path, keep_latest=1, tell=told[1])
    store.add(2)
    assert store.steps() == [1, 2] and "may be lost with the power" in told[0][0]
