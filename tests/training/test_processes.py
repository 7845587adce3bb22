"""Several processes on one machine, for real: the same run as one process."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from ports import free_port
from tiny import losses, metrics, tiny_config, write_config

DEVICES = 4


SCRIPT = """
import json, os, sys, time
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(sys.argv[3]))
sys.argv[3:4] = []
index = int(sys.argv[-1].partition("=")[2]) if "process_id" in sys.argv[-1] else 0
exec(os.environ.get("DISTURBED", ""))
from stablelm_jax.train import main
main()
"""


def config_file(folder, data, **overrides):
    config = tiny_config(data, **{"checkpoint.every": 6, **overrides})
    return write_config(config, folder)


def run(count, path, workdir, *, skip=(), more=(), own=()):
    """Starts `count` processes that share DEVICES devices; returns (exit code, output, stderr).

    `own`: more flags of single processes, by index.
    """
    coordinator = f"127.0.0.1:{free_port()}"
    started = []
    for index in range(count):
        if index in skip:
            continue
        command = [sys.executable, "-c", SCRIPT, f"--config={path}", f"--workdir={workdir}"]
        command.insert(5, str(DEVICES // count))
        if count > 1:
            command += [f"--coordinator={coordinator}", f"--num_processes={count}"]
            command += [f"--process_id={index}"]
        started.append(
            subprocess.Popen(
                [*command, *more, *dict(own).get(index, ())],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
            )
        )
    ends = [process.communicate(timeout=240) for process in started]
    return [(p.returncode, out, err) for p, (out, err) in zip(started, ends)]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    ((code, _, err),) = run(1, config_file(folder, data), folder / "run")
    assert code == 0, err
    return losses(metrics(folder / "run"))


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.by_hand)])
def test_several_processes_give_the_losses_of_one_and_fewer_go_on_from_their_checkpoint(
    data, alone, tmp_path, count
):
    half = tmp_path / "half"
    half.mkdir()
    path = config_file(half, data, **{"training.num_steps": 6})
    for index, (code, out, err) in enumerate(run(count, path, tmp_path / "run")):
        assert code == 0, err
        assert ("finished step 6" in out) == (index == 0)  # process 0 speaks for all
    slowest = [x["step_seconds/slowest_host"] for x in metrics(tmp_path / "run") if "loss" in x]
    assert len(slowest) == 6 and set(slowest) <= set(range(count))
    path = config_file(tmp_path, data)
    ends = run(count // 2, path, tmp_path / "run")
    assert [code for code, *_ in ends] == [0] * (count // 2), ends[0][2] + ends[-1][2]
    assert "resuming from" in ends[0][1] and "finished step 12" in ends[0][1]
    found = losses(metrics(tmp_path / "run"))
    assert list(found) == list(alone)
    np.testing.assert_allclose(list(found.values()), list(alone.values()), rtol=0, atol=2e-5)


def test_a_missing_process_ends_the_others_with_its_number(data, tmp_path, monkeypatch):
    monkeypatch.setenv("STABLELM_MEETING_SECONDS", "3")
    ends = run(4, config_file(tmp_path, data), tmp_path / "run", skip=(2,))
    for code, _, err in ends:
        assert code == 1
        assert "started on 3 of 4 hosts: missing 2" in err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_process_without_its_config_tells_the_others_why_it_cannot_start(data, tmp_path):
    path = config_file(tmp_path, data)
    (first, _, said), (second, _, own) = run(
        2, path, tmp_path / "run", own={1: ["--config.training.num_steps=0"]}
    )
    assert (first, second) == (1, 2)
    assert own.splitlines()[-1].startswith("error: config.training.num_steps=0")
    assert "process 1 on " in said and "cannot start: ConfigError" in said.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_host_that_does_not_see_the_run_folder_is_named_on_all(data, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    ends = run(
        2, config_file(tmp_path, data), tmp_path / "run", own={1: [f"--workdir={elsewhere}"]}
    )
    for code, _, err in ends:
        assert code == 1
        assert "process(es) 1 (" in err.splitlines()[-1]
        assert f"does not see in --workdir {elsewhere}" in err.splitlines()[-1]
    assert not (tmp_path / "run").exists()  # nothing is left of the start


@pytest.mark.by_hand  # how the samples are taken is tested in test_shard_samples.py
def test_a_host_with_other_bytes_under_the_same_manifest_is_named_on_all(data, tmp_path):
    other = shutil.copytree(data, tmp_path / "other")
    shard = other / "squares" / "train-00000.bin"
    np.fromfile(shard, "<i4")[::-1].tofile(shard)
    own = {1: [f"--config.data.root={other}"]}
    for code, _, err in run(2, config_file(tmp_path, data), tmp_path / "run", own=own):
        assert code == 1
        said = err.splitlines()[-1]
        assert "process(es) 1 (" in said and f"{shard}: sha256" in said and "manifest says" in said


# Process 1 compiles for longer than the limit of a hang; process 0 is killed after a checkpoint.
DISTURBED = """
import os, signal, time
from stablelm_jax.parallel import distributed
from stablelm_jax.training import loop, programs
distributed._TELL_SECONDS = 3.0
compile_step, step = programs.compile_step, loop.Trainer._step
def slow(run):
    time.sleep(12 * index)
    return compile_step(run)
def dies(trainer, *arguments):
    if index == 0 and trainer.progress.step == 5:
        trainer.services.saver._settle()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer, *arguments)
programs.compile_step, loop.Trainer._step = slow, dies
"""


def test_one_compiles_late_and_is_no_hang_one_is_killed_and_the_other_leaves_with_75(
    data, tmp_path, monkeypatch
):
    overrides = {"training.hang_seconds": 10.0, "evaluation.every": 0, "samples.every": 0}
    path = config_file(tmp_path, data, **overrides, **{"checkpoint.every": 4})
    with monkeypatch.context() as patch:
        patch.setenv("DISTURBED", DISTURBED)
        (killed, out, first), (code, _, err) = run(2, path, tmp_path / "run")
    assert killed == -9 and "waiting for process 1" in first
    assert code == 75, err
    assert "HUNG" not in out + err
    assert not any(path.stat().st_size for path in tmp_path.glob("run/hang/*"))
    assert "process 0 is gone, killed or with its machine" in err.splitlines()[-1]
    assert f"checkpoint {tmp_path / 'run/checkpoints/global_step4'} is whole" in err


# The disk of process 1 is full at one save.
FULL = """
import resource, signal
from stablelm_jax.checkpoint import saving
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
write, endless = saving.start_writing, resource.RLIM_INFINITY
def full(writer, path, *content):
    most = 2000 if index == 1 and path.name == "global_step2" else endless
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, endless))
    write(writer, path, *content)
saving.start_writing, saving.RETRY_SECONDS = full, 0.0
"""


@pytest.mark.by_hand  # the wait at a barrier is tested in tests/checkpoint/test_barrier.py
def test_a_save_that_fails_on_one_host_names_it_on_all_and_the_run_goes_on(
    data, tmp_path, monkeypatch
):
    monkeypatch.setenv("DISTURBED", FULL)
    path = config_file(tmp_path, data, **{"checkpoint.every": 2, "training.num_steps": 8})
    for index, (code, out, err) in enumerate(run(2, path, tmp_path / "run")):
        assert code == 0, err
        said = out if index == 0 else err
        assert "global_step2 COULD NOT BE SAVED" in said and "File too large" in said
        assert "Traceback" not in out + err
    assert (tmp_path / "run/orbax-process1.log").stat().st_size
    steps = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert "global_step8" in steps and "global_step2" not in steps


@pytest.mark.by_hand  # the bucket of one process is tested in test_bucket_run.py
def test_two_processes_share_a_run_folder_in_a_bucket(data, alone, tmp_path, gcs, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for steps in (6, 12):
        path = config_file(tmp_path, data, **{"training.num_steps": steps})
        for code, _, err in run(2, path, "gs://processes/runs/two"):
            assert code == 0, err
    lines = gcs.objects["processes/runs/two/metrics.jsonl"].splitlines()
    found = losses([json.loads(line) for line in lines])
    assert list(found) == list(alone)
    np.testing.assert_allclose(list(found.values()), list(alone.values()), rtol=0, atol=2e-5)
