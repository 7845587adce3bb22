"""The verb as a user meets it: a process, its exit codes, its signals."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tiny import bare_config, write_config

STEPS = 60


@pytest.fixture(scope="module")
def config_file(data, tmp_path_factory):
    """The tiny run as a config file, long enough to be killed in."""
    long = {"training.num_steps": STEPS, "schedule.total_steps": 100, "checkpoint.every": 10}
    return write_config(bare_config(data, **long), tmp_path_factory.mktemp("configs"))


def start(config_file, workdir, *more):
    command = [
        sys.executable,
        "-m",
        "stablelm_jax.train",
        f"--config={config_file}",
        f"--workdir={workdir}",
        *more,
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )


def finish(config_file, workdir, *more):
    process = start(config_file, workdir, *more)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def wait_for_step(workdir, step, process):
    """Returns once the metrics file has a whole line of `step`."""
    path = workdir / "metrics.jsonl"
    for _ in range(3000):
        if path.exists() and path.read_text().count("\n") >= step:
            return
        if process.poll() is not None:
            raise AssertionError(f"ended early: {process.communicate()}")
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in a minute")


@pytest.fixture(scope="module")
def undisturbed(config_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    code, out, err = finish(config_file, workdir)
    assert code == 0, err
    return workdir, out


def test_a_finished_run_says_what_it_decided_and_where_its_checkpoint_lies(undisturbed):
    workdir, out = undisturbed
    for said in (
        "parameters",
        "mesh",
        "mixture, repeating every 4 rows",
        "4.695 nats",
        "layers/attention/query/kernel",
        f"step {STEPS}/{STEPS}",
    ):
        assert said in out
    assert f"global_step{STEPS}" in out.replace("\n", "").split("finished step")[1]


@pytest.mark.by_hand
def test_a_run_does_not_depend_on_its_terminal(config_file, undisturbed, tmp_path):
    """Its reader goes away after a line, and the terminal has no letter for the folder's name."""
    workdir = tmp_path / "lr[a] é"
    command = [sys.executable, "-m", "stablelm_jax.train", f"--config={config_file}"]
    done = subprocess.run(
        [
            "bash",
            "-c",
            '"$@" | head -n 1; exit ${PIPESTATUS[0]}',
            "-",
            *command,
            "--workdir",
            workdir,
        ],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "XLA_FLAGS": "", "PYTHONIOENCODING": "ascii"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and done.stdout.strip().endswith("lr[a] \\xe9")
    assert losses(workdir) == losses(undisturbed[0])
    events = (workdir / "events.jsonl").read_text(encoding="utf-8")
    assert events.count("output_lost") == 2 and "Broken pipe" in events and "ascii" in events


def test_ctrl_c_saves_a_checkpoint_exits_75_and_the_next_start_goes_on(
    config_file, undisturbed, tmp_path
):
    process = start(config_file, tmp_path)
    wait_for_step(tmp_path, 15, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "stopped by SIGINT after step" in out and "run the same command again" in out
    code, out, err = finish(config_file, tmp_path)
    assert code == 0, err
    assert "resuming from" in out
    assert losses(tmp_path) == losses(undisturbed[0])


def test_a_finished_run_started_again_has_nothing_to_do(config_file, undisturbed):
    workdir, _ = undisturbed
    before = losses(workdir)
    code, out, err = finish(config_file, workdir)
    assert code == 0, err
    assert losses(workdir) == before


def test_a_bad_config_is_one_line_and_exit_code_2(config_file, tmp_path):
    code, _, err = finish(config_file, tmp_path, "--config.model.num_heads=3")
    assert code == 2
    assert len(err.strip().splitlines()) == 1 and "width" in err


def test_missing_data_is_one_line_that_names_the_file_and_exit_code_1(config_file, tmp_path):
    code, _, err = finish(config_file, tmp_path, "--config.data.root=/nowhere/at/all")
    assert code == 1
    assert "/nowhere/at/all" in err.strip().splitlines()[-1]
