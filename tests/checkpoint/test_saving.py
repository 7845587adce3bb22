"""The states of a save: under way, whole, failed and tried again."""

import collections
import contextlib
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelm_jax import config as config_lib
from stablelm_jax.checkpoint import saving
from stablelm_jax.checkpoint.reading import read_arrays, read_run
from stablelm_jax.checkpoint.saving import SaveFailed, Saver
from stablelm_jax.checkpoint.store import CheckpointStore


class Told(list):
    def tell(self, event, text, *, style="", **fields):
        self.append((event, fields["step"], text))


def small(value=1.0):
    arrays = {"params": {"kernel": jnp.full((8, 16), value)}, "optimizer": {"count": jnp.int32(3)}}
    return arrays, {}


@pytest.fixture
def saver(tmp_path):
    """Makes a saver: `.store`, `.told`; settings of the group `checkpoint` as keywords."""
    made = []

    def make(**settings):
        config = config_lib.default_config().checkpoint
        config.update(settings)
        saver = Saver(config, CheckpointStore(tmp_path / "checkpoints", keep_latest=3), Told())
        saver.store, saver.told = saver._store, saver._events
        made.append(saver)
        return saver

    yield make
    for saver in made:
        saver.close()


@pytest.fixture
def clock(monkeypatch):
    """Lets the time of `saving` pass: `clock.now += 60`."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            self.now += 1

    clock = Clock()
    monkeypatch.setattr(saving, "time", clock)
    return clock


def fails(monkeypatch, *steps):
    """Saves of these steps fail, the first as often as it is named."""
    write, left = saving.start_writing, list(steps)

    def failing(writer, path, *content):
        step = int(path.name.removeprefix("global_step"))
        if step in left:
            left.remove(step)
            raise OSError("no space left")
        write(writer, path, *content)

    monkeypatch.setattr(saving, "start_writing", failing)


def test_donating_the_arrays_right_after_save_does_not_change_what_is_stored(saver):
    saver = saver()
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    saved = small(5.0)
    copy = jax.device_get(saved[0]["params"])
    saver.save(1, lambda: saved)
    step(saved[0]["params"])
    saver.close()
    path = saver.store.folder / "global_step1"
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {"params": {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=place)}}
    arrays = read_arrays(path, wanted, read_run(path))
    jax.tree.map(np.testing.assert_array_equal, arrays["params"], copy)


def test_a_save_is_among_the_steps_once_it_is_whole_and_is_not_made_twice(saver):
    saver = saver(asynchronous=False)
    made = []
    for _ in range(2):
        saver.save(4, lambda: made.append(4) or small())
    saver.finish(4, lambda: made.append(4) or small())
    assert saver.store.steps() == made == [4] and saver.last_step == 4


def test_a_second_save_waits_for_the_first_and_says_so_after_ten_seconds(saver, clock, monkeypatch):
    saver = saver()
    saver.save(1, small)
    ended = iter([False] * 30)
    monkeypatch.setattr(saver, "_has_ended", lambda: next(ended, True))
    saver.save(2, small)
    ((event, step, text),) = saver.told
    assert (event, step) == ("slow_save", 2)
    assert "global_step1 is still being written, for 11 s" in text
    saver.close()
    assert saver.store.steps() == [1, 2]


def test_a_save_that_fails_is_told_and_due_again_after_sixty_seconds(saver, clock, monkeypatch):
    saver = saver(asynchronous=False)
    saver.save(4, small)
    fails(monkeypatch, 5)
    saver.save(5, small)
    ((event, step, text),) = saver.told
    assert (event, step) == ("save_failed", 5) and "global_step4 is whole" in text
    assert "no space left" in text and "another try follows within 60 s" in text
    assert not saver.due_by_time()
    clock.now += 60
    assert saver.due_by_time()
    saver.save(6, small)
    assert saver.store.steps() == [4, 6] and not saver.due_by_time()


def test_a_save_that_fails_in_the_background_is_noticed_and_leaves_nothing(saver, monkeypatch):
    saver = saver()

    def broken(directory):
        raise OSError("the disk is gone")

    monkeypatch.setattr(saver._writer._handler, "finalize", broken)
    saver.save(3, small)
    while not saver.told:
        saver.look()
    assert saver.told[0][:2] == ("save_failed", 3) and "there is no older one" in saver.told[0][2]
    assert saver.store.steps() == [] and list(saver.store.folder.iterdir()) == []


def test_a_save_whose_checksums_fail_is_told_and_leaves_nothing(saver, monkeypatch):
    saver = saver()

    def broken(started):
        raise RuntimeError("out of memory on the device")

    monkeypatch.setattr(saving, "fetch_checksums", broken)
    saver.save(3, small)
    saver.close()
    ((event, step, text),) = saver.told
    assert (event, step) == ("save_failed", 3) and "out of memory on the device" in text
    assert saver.store.steps() == [] and list(saver.store.folder.iterdir()) == []


def test_a_save_that_one_process_cannot_start_runs_the_programs_that_the_others_run(
    saver, monkeypatch
):
    """Of several processes the others would else wait for it in the next program."""
    saver, summed = saver(), []

    def broken(path, args):
        raise MemoryError("no room for a copy")

    monkeypatch.setattr(saver._writer, "save", broken)
    monkeypatch.setattr(saving, "start_checksums", summed.append)
    saver.save(3, small)
    assert len(summed) == 1 and saver.told[0][:2] == ("save_failed", 3)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own")
def test_threads_that_write_leave_the_cores_to_the_steps_and_no_other_thread_does(saver):
    saver = saver()
    arrays = {"params": {"kernel": jnp.ones((2**20, 8))}, "optimizer": {"count": jnp.int32(3)}}
    saver.save(1, lambda: (arrays, {}))
    found = collections.defaultdict(set)
    while saver._writing:
        saver.look()
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):  # it has just ended
                name = Path(f"/proc/self/task/{task}/comm").read_text().strip()
                found[name].add(os.sched_getscheduler(int(task)))
    assert saver.store.steps() == [1] and os.SCHED_IDLE in found.pop("ts_pool_worker")
    assert set.union(*found.values()) == {os.sched_getscheduler(0)}


def test_the_last_save_is_tried_twice(saver, monkeypatch):
    saver = saver()
    fails(monkeypatch, 7, 8, 8)
    saver.finish(7, small)
    assert saver.store.steps() == [7] and len(saver.told) == 1
    with pytest.raises(SaveFailed, match="global_step8 could not be written.*from global_step7"):
        saver.finish(8, small)
    assert saver.store.steps() == [7] and len(saver.told) == 3


def test_temporary_checkpoints_are_due_by_the_clock(saver, clock):
    never, sometimes = saver(), saver(every_minutes=2.0)
    clock.now += 119
    assert not sometimes.due_by_time()
    clock.now += 1
    assert sometimes.due_by_time() and not never.due_by_time()


def test_what_cannot_be_made_is_an_error_of_the_run_and_no_failed_save(saver):
    saver = saver()

    def changed():
        raise ValueError("shards were changed")

    with pytest.raises(ValueError, match="shards were changed"):
        saver.save(1, changed)
    assert not saver.told


def test_closing_never_raises(saver, monkeypatch):
    saver = saver()
    saver.save(1, small)
    for name in ("wait_until_finished", "close"):
        method = getattr(saver._writer, name)
        monkeypatch.setattr(saver._writer, name, lambda method=method: (method(), 1 / 0))
    saver.close()
    assert saver.told[0][0] == "save_failed"


def test_a_folder_whose_name_looks_like_a_pattern_holds_whole_checkpoints(tmp_path):
    folder = tmp_path / "lr[a] *?" / "checkpoints"
    config = config_lib.default_config().checkpoint
    saver = Saver(config, CheckpointStore(folder, keep_latest=3), Told())
    saver.finish(7, lambda: small(2.0))
    saver.close()
    like = {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32)}
    path = folder / "global_step7"
    found = read_arrays(path, {"params": like}, read_run(path))
    np.testing.assert_array_equal(found["params"]["kernel"], np.full((8, 16), 2.0))
