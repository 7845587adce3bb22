"""launch/slurm.sbatch with an srun and a scontrol that take notes and fail on purpose."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRUN = """#!/bin/sh
printf '%s\\n' "$*" "flags $XLA_FLAGS" >>"$NOTES"
trap 'exit 75' TERM
[ -z "$SRUN_SAYS" ] || echo "slurmstepd-n1: error: *** $SRUN_SAYS ***" >&2
if [ -n "$SRUN_WAITS" ]; then touch "$SRUN_WAITS"; while :; do sleep 0.05; done; fi
[ -z "$TASKS" ] || shift # its own flag
largest=${SRUN_STATUS:-0}
for status in $TASKS; do # one task after the other; the largest exit code is reported
    TASK_STATUS=$status "$@"
    status=$?
    [ "$status" -le "$largest" ] || largest=$status
done
exit "$largest"
"""
# Of the checkout: the training ends as TASK_STATUS says, by itself or by a signal.
PYTHON = """#!/bin/sh
case "$*" in
*restarts.py*) [ -z "$MAY_START" ] || echo "$@" >>"$NOTES"; exit "${MAY_START:-0}" ;;
*) [ "$TASK_STATUS" != 137 ] || kill -KILL $$; exit "${TASK_STATUS:-0}" ;;
esac
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
    (checkout / ".venv/bin/python").write_text(PYTHON)
    (checkout / ".venv/bin/python").chmod(0o755)
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

    def start(*arguments, stderr=subprocess.PIPE, **more):
        return subprocess.Popen(
            ["bash", str(spool / "script"), *arguments],
            env=environment | more,
            cwd=spool,
            stdout=subprocess.PIPE,
            stderr=stderr,
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


@pytest.mark.parametrize("others", ["75", "137", "0"])  # 137: srun kills who does not stop
@pytest.mark.parametrize("status", [1, 2])
def test_an_error_of_one_task_ends_the_job_whatever_became_of_the_others(job, status, others):
    code, out, err = ended(job("c", "w", TASKS=f"{others} {status} {others}"))
    assert code == status and f"ended with exit code {status}" in err.splitlines()[-1]
    assert "again" not in out and not any(line.startswith("scontrol") for line in notes(job))
    assert not list(job.tmp_path.glob("a checkout/*.error"))


@pytest.mark.parametrize("tasks", ["75 137", "137 75", "75 134", "139"])
def test_a_task_that_was_killed_while_the_others_stopped_is_a_reason_to_start_again(job, tasks):
    code, out, err = ended(job("c", "w", TASKS=tasks))
    assert code == 0, err
    assert "was killed or crashed" in out and "whole checkpoint" not in out
    assert notes(job)[-1] == "scontrol requeue 42"


def test_before_each_start_and_before_queueing_again_it_asks_whether_there_is_progress(job):
    more = {"TASKS": "75", "SLURM_RESTART_COUNT": "3", "MAY_START": "0"}
    assert ended(job("c", "runs/a b", **more))[0] == 0
    asked = [line for line in notes(job) if "restarts.py" in line]
    assert asked == [f"launch/restarts.py runs/a b slurm-42 {number}" for number in (3, 4)]


def test_without_progress_it_does_not_begin_and_is_not_queued_again(job):
    """A failed node: SLURM itself queued the job again."""
    assert ended(job("c", "w", TASKS="75", MAY_START="1"))[0] == 1
    assert notes(job) == ["launch/restarts.py w slurm-42 0"]


def test_the_signal_for_a_task_reaches_the_training_and_its_exit_code_is_kept(tmp_path):
    training = "import signal; signal.signal(15, lambda *_: exit(75)); print(flush=True)"
    training += "; signal.pause()"
    task = subprocess.Popen(
        ["bash", ROOT / "launch/slurm_task.sh", tmp_path / "e", sys.executable, "-c", training],
        stdout=subprocess.PIPE, process_group=0,
    )  # fmt: skip
    task.stdout.readline()
    os.killpg(task.pid, signal.SIGTERM)  # as SLURM does: every process of the task
    assert task.wait(timeout=30) == 75
    assert not (tmp_path / "e").exists()


def test_a_task_tells_the_training_that_a_launch_script_starts_it_again(tmp_path):
    """Else it is an error that another process was killed before the first checkpoint."""
    script = ROOT / "launch/slurm_task.sh"
    asks = 'test "$STABLELM_STARTED_AGAIN" = yes && exit 75'
    assert subprocess.run(["bash", script, tmp_path / "e", "sh", "-c", asks]).returncode == 75
    assert not (tmp_path / "e").exists()


def test_a_run_that_was_stopped_is_queued_again_after_failed_attempts(job):
    (job.tmp_path / "fails").write_text("2")
    code, out, _ = ended(job("c", "w", SRUN_STATUS="75"))
    assert code == 0 and "queueing job 42 again" in out
    assert [line for line in notes(job) if "requeue" in line] == ["scontrol requeue 42"] * 3


@pytest.mark.parametrize(
    "said, again",
    [
        ("JOB 42 ON n1 CANCELLED AT 2026-01-02T03:04:05", False),
        ("JOB 42 ON n1 CANCELLED AT 2026-01-02T03:04:05 DUE TO TIME LIMIT", True),
        ("JOB 42 ON n1 CANCELLED AT 2026-01-02T03:04:05 DUE TO PREEMPTION", True),
        ("STEP 42.0 ON n1 CANCELLED AT 2026-01-02T03:04:05", True),
        ("JOB 142 ON n1 CANCELLED AT 2026-01-02T03:04:05", True),
    ],
)
def test_a_job_that_somebody_cancels_does_not_come_back(job, said, again):
    log = job.tmp_path / "log"
    with open(log, "a") as stderr:
        process = job("c", "w", stderr=stderr, SRUN_STATUS="75", SRUN_SAYS=said)
        assert process.wait(timeout=30) == (0 if again else 75)
    assert ("scontrol requeue 42" in notes(job)) == again
    assert again or "was cancelled" in log.read_text().splitlines()[-1]


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
