"""launch/slurm.sbatch with an srun and a scontrol that take notes and fail on purpose."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRUN = """#!/bin/sh
printf '%s\\n' "$*" "flags $XLA_FLAGS" >>"$NOTES"
trap 'exit 75' TERM
if [ -n "$SRUN_WAITS" ]; then touch "$SRUN_WAITS"; while :; do sleep 0.05; done; fi
exit "${SRUN_STATUS:-0}"
"""
SCONTROL = """#!/bin/sh
echo "scontrol $*" >>"$NOTES"
left=$(cat "$SCONTROL_FAILS" 2>/dev/null || echo 0)
[ "$left" -gt 0 ] || exit 0
echo $((left - 1)) >"$SCONTROL_FAILS"
exit 1
"""


@pytest.fixture
def job(tmp_path):
    """A checkout with a .venv, and a way to run the script as SLURM does: a copy, elsewhere."""
    checkout, spool, programs = tmp_path / "a checkout", tmp_path / "spool", tmp_path / "programs"
    shutil.copytree(ROOT / "launch", checkout / "launch")
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/python").symlink_to("/bin/true")
    spool.mkdir()
    programs.mkdir()
    shutil.copy(ROOT / "launch/slurm.sbatch", spool / "script")
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "NOTES": str(tmp_path / "notes"),
        "SLURM_SUBMIT_DIR": str(checkout),
        "SLURM_JOB_ID": "42",
        "REQUEUE_PAUSE": "0",
        "SCONTROL_FAILS": str(tmp_path / "fails"),
    }

    def start(*arguments, **more):
        return subprocess.Popen(
            ["bash", str(spool / "script"), *arguments],
            env=environment | more,
            cwd=spool,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    start.tmp_path = tmp_path
    return start


def ended(process):
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def notes(job):
    return (job.tmp_path / "notes").read_text().splitlines()


def test_every_node_trains_with_the_settings_for_gpus(job):
    code, _, err = ended(job("configs/a.py", "runs/a b", "--config.seed=3"))
    assert code == 0, err
    command, flags = notes(job)
    assert command.endswith("-m stablelm_jax.train --config configs/a.py --workdir runs/a b "
                            "--config.seed=3")  # fmt: skip
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in flags


@pytest.mark.parametrize("status", ["1", "2"])
def test_an_error_is_handed_on_and_the_job_not_queued_again(job, status):
    assert ended(job("c", "w", SRUN_STATUS=status))[0] == int(status)
    assert not any(line.startswith("scontrol") for line in notes(job))


def test_a_run_that_was_stopped_is_queued_again_after_failed_attempts(job):
    (job.tmp_path / "fails").write_text("2")
    code, out, _ = ended(job("c", "w", SRUN_STATUS="75"))
    assert code == 0 and "queueing job 42 again" in out
    assert [line for line in notes(job) if "requeue" in line] == ["scontrol requeue 42"] * 3


def test_where_it_cannot_be_queued_again_it_says_so_and_keeps_the_exit_code(job):
    (job.tmp_path / "fails").write_text("9")
    code, _, err = ended(job("c", "w", SRUN_STATUS="75"))
    assert code == 75 and "could not be queued again" in err.splitlines()[-1]


def test_a_signal_to_the_script_itself_does_not_end_it_before_the_training(job):
    waits = job.tmp_path / "waits"
    process = job("c", "w", SRUN_WAITS=str(waits))
    while not waits.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # the shell alone
    time.sleep(0.3)
    assert process.poll() is None
    subprocess.run(["pkill", "-TERM", "-P", str(process.pid)], check=True)  # now the training
    code, out, _ = ended(process)
    assert code == 0 and "queueing job 42 again" in out


@pytest.mark.parametrize("arguments", [(), ("config",)])
def test_missing_arguments_are_refused_with_the_usage(job, arguments):
    code, _, err = ended(job(*arguments))
    assert code == 2 and "usage: sbatch" in err


def test_a_folder_that_is_no_checkout_is_refused(job):
    code, _, err = ended(job("c", "w", SLURM_SUBMIT_DIR=str(job.tmp_path)))
    assert code == 2 and "no checkout with a .venv" in err
