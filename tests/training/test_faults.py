"""Updates left out, spikes, replicas that drift, saves that fail, shards that change, hangs."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import bare_config, events, losses, metrics, train, write_config, write_data

from stablelm_jax.checkpoint import saving
from stablelm_jax.checkpoint.reading import read_run
from stablelm_jax.parallel.mesh import make_mesh
from stablelm_jax.training import loop, update_guard
from stablelm_jax.training.faults import diverged, inspection_command, make_replica_check
from stablelm_jax.training.setup import Run
from stablelm_jax.training.update_guard import is_spike


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, train(bare_config(data), workdir)[1]


def checksums(workdir, number):
    return read_run(workdir / f"checkpoints/global_step{number}")["checksums"]


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the loss of some steps, counted from 0, not finite: their loss mask is not."""

    def poison(*steps):
        batches = Run.batches

        def wrapped(run, step):
            inner = batches(run, step)

            class Poisoned:
                number = step

                def __next__(self):
                    batch = next(inner)
                    if self.number in steps:
                        batch["loss_mask"] = batch["loss_mask"] * np.float32("nan")
                    self.number += 1
                    return batch

                def close(self):
                    inner.close()

            return Poisoned()

        monkeypatch.setattr(Run, "batches", wrapped)

    return poison


def test_an_update_that_is_not_finite_is_left_out_counted_and_told(data, tmp_path, poisoned):
    poisoned(5)
    code, lines = train(bare_config(data, **{"training.log_every": 4}), tmp_path)
    assert code == 0
    assert [line["updates_skipped"] for line in lines] == [0, 1, 1]
    assert all(line["loss"] is not None for line in lines)  # of the updates that were applied
    (told,) = events(tmp_path, "update_skipped")
    assert told["step"] == 6 and told["why"] == "not finite"
    assert told["sources"] == {"fibonacci": None, "squares": None}


def test_too_many_in_a_row_stop_the_run_at_the_checkpoint_before_them(
    data, undisturbed, tmp_path, poisoned, monkeypatch
):
    poisoned(6, 7, 8, 9, 10, 11)
    code, _ = train(bare_config(data, **{"training.stop_after_skipped": 3}), tmp_path)
    assert code == 1
    (told,) = events(tmp_path, "stopped")
    assert "3 updates in a row were left out, steps 7 to 9" in told["text"]
    assert "stablelm_jax.inspect_data" in told["text"] and "--step=7" in told["text"]
    # What was saved is the state after 6 steps: with sound data it gives the undisturbed run.
    assert read_run(tmp_path / "checkpoints/global_step6")["rows_consumed"] == 6 * 8
    assert (tmp_path / "checkpoints/global_step8.skipped").exists()
    monkeypatch.undo()
    code, lines = train(bare_config(data), tmp_path)
    assert code == 0 and losses(lines) == losses(undisturbed[1])
    assert checksums(tmp_path, 12) == checksums(undisturbed[0], 12)


def test_a_row_of_bad_updates_between_two_log_lines_stops_the_run_too(data, tmp_path, poisoned):
    poisoned(5, 6, 7)  # and sound ones after them, before anybody looks
    overrides = {"training.stop_after_skipped": 3, "training.log_every": 12}
    code, _ = train(bare_config(data, **overrides, **{"checkpoint.every": 12}), tmp_path)
    assert code == 1
    assert read_run(tmp_path / "checkpoints/global_step5")["rows_consumed"] == 5 * 8
    assert len(events(tmp_path, "update_skipped")) == 3


def test_a_row_of_bad_updates_is_counted_over_restarts_and_log_lines(data, tmp_path, poisoned):
    poisoned(*range(5, 12))
    overrides = {"training.stop_after_skipped": 5, "training.log_every": 2}
    assert train(bare_config(data, **overrides, **{"training.num_steps": 8}), tmp_path)[0] == 0
    code, _ = train(bare_config(data, **overrides), tmp_path)
    assert code == 1
    assert read_run(tmp_path / "checkpoints/global_step5")["step"] == 5
    assert [e["in_a_row"] for e in events(tmp_path, "update_skipped")] == [1, 2, 3, 4, 5]


def test_the_command_for_the_batch_takes_the_runs_own_arguments():
    given = ["--config", "c.py", "--config.data.root=a b", "--workdir=w", "--process_id", "1"]
    expected = (
        "python -m stablelm_jax.inspect_data --config c.py '--config.data.root=a b' --workdir=w "
        "--step=7"
    )
    assert inspection_command(7, given) == expected


def test_the_guards_statistics_are_those_of_numpy_until_the_window_is_full():
    rng = np.random.default_rng(0)
    seen = rng.normal(3.0, 0.2, 50)
    statistics = {name: jnp.float32(0) for name in ("mean", "variance", "count")}
    guard = {"kind": "skip", "sigmas": 5.0, "window": 50}
    for loss in seen:
        spike, statistics = is_spike(statistics, jnp.float32(loss), guard)
        assert not spike
    np.testing.assert_allclose(statistics["mean"], seen.mean(), rtol=1e-5)
    np.testing.assert_allclose(statistics["variance"], seen.var(), rtol=1e-4)
    just_below = statistics["mean"] + 4.9 * jnp.sqrt(statistics["variance"])
    just_above = statistics["mean"] + 5.1 * jnp.sqrt(statistics["variance"])
    assert not is_spike(statistics, just_below, guard)[0]
    assert is_spike(statistics, just_above, guard)[0]


@pytest.fixture
def jumping(monkeypatch):
    """Lets the loss that the guard sees of some steps, counted from 0, jump."""

    def jump(*steps):
        def shifted(statistics, loss, guard):
            number = statistics["count"]  # of the steps taken in: spikes are not among them
            return is_spike(
                statistics, jnp.where(jnp.isin(number, jnp.array(steps)), 50, loss), guard
            )

        monkeypatch.setattr(update_guard, "is_spike", shifted)

    return jump


@pytest.fixture
def one_jump(monkeypatch):
    """The loss that the guard sees of one step, counted from 0, jumps; those after it do not."""

    def jump(number):
        def shifted(statistics, loss, guard):
            first = (statistics["count"] == number) & (statistics["in_a_row"] == 0)
            return is_spike(statistics, jnp.where(first, 50, loss), guard)

        monkeypatch.setattr(update_guard, "is_spike", shifted)

    return jump


@pytest.mark.parametrize("log_every", [1, pytest.param(5, marks=pytest.mark.by_hand)])
def test_one_spike_stops_the_run_before_it_where_the_guard_says_so(
    data, tmp_path, one_jump, log_every
):
    one_jump(9)
    stop = {"guard.kind": "stop", "guard.window": 6, "training.log_every": log_every}
    code, _ = train(bare_config(data, **stop), tmp_path)
    assert code == 1
    (told,) = events(tmp_path, "update_skipped")
    assert (told["step"], told["why"]) == (10, "spike")
    saved = read_run(tmp_path / "checkpoints/global_step9")
    assert saved["guard"]["count"] == 9 and saved["guard"]["held"] == 0


def test_spikes_are_left_out_where_the_guard_skips(data, tmp_path, jumping):
    jumping(9)  # and every step after it, as the count then stays
    skip = {"guard.kind": "skip", "guard.window": 6, "training.stop_after_skipped": 5}
    code, lines = train(bare_config(data, **skip), tmp_path)
    assert code == 0 and lines[-1]["updates_skipped"] == 3
    assert [e["step"] for e in events(tmp_path, "update_skipped")] == [10, 11, 12]


def test_the_guards_statistics_survive_a_restart_bit_for_bit(data, tmp_path):
    guard = {"guard.kind": "skip", "guard.window": 6}
    train(bare_config(data, **guard), tmp_path / "whole")
    for steps in (8, 12):
        train(bare_config(data, **guard, **{"training.num_steps": steps}), tmp_path / "parted")
    whole, parted = (
        read_run(tmp_path / name / "checkpoints/global_step12")["guard"]
        for name in ("whole", "parted")
    )
    assert whole == parted and whole["count"] == 12


def replicated_but_for(mesh, spec, value, device, bit):
    """`value` placed by `spec`, one bit of one device's part flipped."""
    place = jax.NamedSharding(mesh, spec)
    parts = []
    for where, index in place.addressable_devices_indices_map(value.shape).items():
        part = np.array(value[index])
        if where == mesh.devices.flat[device]:
            part.view(np.uint32).flat[3] ^= 1 << bit
        parts.append(jax.device_put(part, where))
    return jax.make_array_from_single_device_arrays(value.shape, place, parts)


@pytest.mark.parametrize("bit", [0, 13, 31])
@pytest.mark.parametrize("spec", [jax.P(), jax.P("model"), jax.P(None, "data")])
def test_one_flipped_bit_of_one_replica_is_found_with_its_device(spec, bit):
    mesh = make_mesh(data=4, model=2)
    rng = np.random.default_rng(bit)
    values = {name: rng.normal(size=(8, 16)).astype(np.float32) for name in ("a", "b")}
    place = jax.NamedSharding(mesh, spec)
    good = {k: jax.device_put(v, place) for k, v in values.items()}
    abstract = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=place) for k, v in good.items()}
    check = make_replica_check(abstract, mesh)
    assert diverged(jax.device_get(check(good)), abstract, mesh) == {}
    bad = good | {"b": replicated_but_for(mesh, spec, values["b"], 5, bit)}
    found = diverged(jax.device_get(check(bad)), abstract, mesh)
    # split over data: device 5's one other copy lies on its neighbour along model
    expected = [4, 5] if "data" in spec else [5]
    assert found == {"b": expected}


def test_replicas_that_drift_end_the_run_and_nothing_of_it_is_saved(data, tmp_path, monkeypatch):
    every = {"training.check_replicas_every": 3, "parallel.zero1": False}
    assert train(bare_config(data, **every), tmp_path / "sound")[0] == 0
    compare = loop.Faults.compare_replicas

    def drift(faults, state, number):
        if number == 6:
            kernel = state.params["head"]["kernel"]
            drifted = replicated_but_for(
                kernel.sharding.mesh, kernel.sharding.spec, jax.device_get(kernel), 2, 7
            )
            state.params["head"]["kernel"] = drifted
        compare(faults, state, number)

    monkeypatch.setattr(loop.Faults, "compare_replicas", drift)
    code, _ = train(bare_config(data, **every, **{"checkpoint.every": 6}), tmp_path / "bad")
    assert code == 1
    (told,) = events(tmp_path / "bad", "stopped")
    assert "replicas hold different bits of params/head/kernel" in told["text"]
    assert [p.name for p in (tmp_path / "bad/checkpoints").iterdir()] == ["global_step0"]


@pytest.fixture
def small_disk():
    """No file may grow beyond some bytes: the kernel refuses to write, as with a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield limit
    limit(None)


def test_a_save_that_fails_lets_the_run_go_on_loudly_and_is_tried_again(
    data, undisturbed, tmp_path, monkeypatch
):
    monkeypatch.setattr(saving, "RETRY_SECONDS", 0.0)
    write = saving.start_writing

    def full_for_step_4(writer, path, *content):
        if path.name == "global_step4":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(writer, path, *content)

    monkeypatch.setattr(saving, "start_writing", full_for_step_4)
    code, lines = train(bare_config(data), tmp_path)
    assert code == 0 and losses(lines) == losses(undisturbed[1])
    (told,) = events(tmp_path, "save_failed")
    assert told["step"] == 4 and "COULD NOT BE SAVED" in told["text"]
    assert "global_step0 is whole" in told["text"]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert "global_step5" in names and "global_step12" in names  # the other try, at once here
    assert "global_step4" not in names


def test_a_save_that_fails_in_the_background_is_noticed_at_the_next_step(
    data, undisturbed, tmp_path, small_disk, monkeypatch
):
    write = saving.start_writing

    def full_for_step_4(writer, path, *content):
        small_disk(20_000 if path.name == "global_step4" else None)
        write(writer, path, *content)

    monkeypatch.setattr(saving, "start_writing", full_for_step_4)
    code, lines = train(bare_config(data), tmp_path)
    assert code == 0 and losses(lines) == losses(undisturbed[1])
    (told,) = events(tmp_path, "save_failed")
    assert told["step"] == 4 and "File too large" in told["text"]
    assert checksums(tmp_path, 12) == checksums(undisturbed[0], 12)


def test_a_last_checkpoint_that_cannot_be_written_is_an_error_and_the_older_one_serves(
    data, undisturbed, tmp_path, small_disk, monkeypatch
):
    write = saving.start_writing

    def full_at_the_end(writer, path, *content):
        small_disk(20_000 if path.name == "global_step12" else None)
        write(writer, path, *content)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "start_writing", full_at_the_end)
        with pytest.raises(ValueError, match="global_step12 could not be written.*global_step8"):
            train(bare_config(data), tmp_path)
    small_disk(None)
    code, lines = train(bare_config(data), tmp_path)
    assert code == 0 and losses(lines) == losses(undisturbed[1])


def test_metrics_that_a_full_disk_refuses_are_written_when_it_has_room_again(
    data, undisturbed, tmp_path, monkeypatch
):
    opened, refused = Path.open, []

    def full(path, mode="r", *arguments, **settings):
        if path.name == "metrics.jsonl" and mode == "a" and len(metrics(tmp_path)) == 5:
            refused.append(mode)
            if len(refused) < 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, mode, *arguments, **settings)

    monkeypatch.setattr(Path, "open", full)
    code, lines = train(bare_config(data), tmp_path)
    assert code == 0 and len(refused) == 4
    assert losses(lines) == losses(undisturbed[1])
    assert len(events(tmp_path, "disk")) == 1


def test_fewer_steps_than_a_run_has_done_are_refused(data, undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    with pytest.raises(ValueError, match="num_steps=8, but .* has step 12 already"):
        train(bare_config(data, **{"training.num_steps": 8}), tmp_path / "run")


def test_a_shard_that_changes_under_a_run_ends_it_before_the_next_checkpoint(tmp_path, monkeypatch):
    data = write_data(tmp_path / "sources")
    shard = next((data / "squares").glob("train-*.bin"))
    original = shard.read_bytes()
    take = loop.Trainer._step

    def changing(trainer, *arguments):
        if trainer.progress.step == 5:
            shard.write_bytes(original[:100] + b"\1" + original[101:])
        return take(trainer, *arguments)

    monkeypatch.setattr(loop.Trainer, "_step", changing)
    with pytest.raises(ValueError, match="were changed since this run began"):
        train(bare_config(data), tmp_path / "run")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=shard.name):
        train(bare_config(data), tmp_path / "run")
    shard.write_bytes(original)
    assert train(bare_config(data), tmp_path / "run")[0] == 0


HANGING = """
import sys, time
from stablelm_jax.training import loop
step = loop.Trainer._step
def hang(trainer, *arguments):
    if trainer.progress.step == 6:
        time.sleep(3600)
    return step(trainer, *arguments)
loop.Trainer._step = hang
from stablelm_jax.train import main
main()
"""


SAVE_HANGING = """
import time
from orbax.checkpoint import CompositeCheckpointHandler
finalize = CompositeCheckpointHandler.finalize
def hang(handler, directory):
    if "global_step4" in str(directory):
        time.sleep(3600)
    finalize(handler, directory)
CompositeCheckpointHandler.finalize = hang
from stablelm_jax.train import main
main()
"""


def test_a_save_that_hangs_ends_the_run_by_its_bound_with_75(data, tmp_path):
    bounds = {"training.hang_seconds": 1.0, "checkpoint.timeout_seconds": 3}
    path, run = write_config(bare_config(data, **bounds), tmp_path), tmp_path / "run"
    command = [sys.executable, "-c", SAVE_HANGING, f"--config={path}", f"--workdir={run}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 75, ended.stderr
    assert "HUNG in saving at step 8" in ended.stdout
    assert train(bare_config(data), run)[0] == 0


@pytest.mark.by_hand
def test_temporary_checkpoints_come_by_time_and_go_as_newer_ones_come(data, tmp_path):
    by_time = {"checkpoint.every_minutes": 1e-9, "checkpoint.every": 12}
    train(bare_config(data, **by_time, **{"checkpoint.keep_latest": 4}), tmp_path)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"global_step{step}" for step in (10, 11, 12, 9)]


def test_a_run_that_hangs_leaves_its_stacks_exits_75_and_goes_on(data, undisturbed, tmp_path):
    path = write_config(bare_config(data, **{"training.hang_seconds": 4.0}), tmp_path)
    run = tmp_path / "run"
    ended = subprocess.run(
        [sys.executable, "-c", HANGING, f"--config={path}", f"--workdir={run}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 75, ended.stderr
    assert "HUNG in stepping at step 6 on process 0" in ended.stdout
    stacks = (run / "hang/global_step6-process0.txt").read_text()
    assert "in hang" in stacks
    code, lines = train(bare_config(data, **{"training.hang_seconds": 0.0}), run)
    assert code == 0
    np.testing.assert_allclose(
        list(losses(lines).values()), list(losses(undisturbed[1]).values()), atol=2e-5
    )
    assert metrics(run) == lines
