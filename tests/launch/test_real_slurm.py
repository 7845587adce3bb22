"""launch/slurm.sbatch under a real SLURM: two processes train, on two nodes of this machine.

apt-get install slurm-wlm munge; pytest -m by_hand tests/launch/test_real_slurm.py
"""

import json

import pytest
import real_slurm
from tiny import bare_config, metrics, write_config, write_data

from stablelm_jax import config as config_lib

pytestmark = [
    pytest.mark.by_hand,
    pytest.mark.skipif(bool(real_slurm.missing()), reason="needs Debian's slurm-wlm and munge"),
]

# A config file that ends process 1 once a file is there, in the first so many starts.
SABOTAGE = """
import json, os, threading, time
from stablelm_jax import config as config_lib

def sabotage():
    while not os.path.exists({awaited!r}):
        time.sleep(0.1)
    os._exit(1) if {how!r} == "error" else os.kill(os.getpid(), 9)

def get_config():
    start = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if os.environ.get("SLURM_PROCID") == "1" and start < {starts}:
        threading.Thread(target=sabotage, daemon=True).start()
    return config_lib.from_dict(json.loads({config!r}))
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    made = real_slurm.Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def sabotaged(tmp_path, data, how, starts, awaited="checkpoints/global_step50"):
    """A config whose process 1 ends itself when `awaited` is in the run folder."""
    config = bare_config(data, **{"training.num_steps": 600, "checkpoint.every": 50})
    text = SABOTAGE.format(
        awaited=str(tmp_path / "run" / awaited), how=how, starts=starts,
        config=json.dumps(config_lib.to_dict(config)),
    )  # fmt: skip
    (tmp_path / "sabotage.py").write_text(text)
    return tmp_path / "sabotage.py"


def test_two_processes_train_to_the_last_step(slurm, tmp_path, data):
    job = slurm.submit(write_config(bare_config(data), tmp_path), tmp_path / "run")
    ended = slurm.ended(job)
    print(slurm.log(job))
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), slurm.log(job)
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert [start["num_processes"] for start in environment] == [2]


def test_out_of_time_it_saves_is_queued_again_and_goes_on_and_scancel_ends_it(
    slurm, tmp_path, data
):
    config = bare_config(data, **{"training.num_steps": 1_000_000, "checkpoint.every": 1_000_000})
    path, run = write_config(config, tmp_path), tmp_path / "run"
    job = slurm.submit(path, run, options=["--time=4", "--signal=TERM@60"])
    slurm.wait_for(job, lambda job: "resuming from" in slurm.log(job["JobId"]), seconds=1200)
    log = slurm.log(job)
    print(log)
    assert "the training was stopped" in log and f"queueing job {job} again" in log
    assert int(slurm.job(job)["Restarts"]) >= 1
    slurm.call("scancel", job)
    ended = slurm.ended(job)
    print(slurm.log(job)[len(log) :])
    assert ended["JobState"] == "CANCELLED"


def test_an_error_of_one_process_ends_the_job(slurm, tmp_path, data):
    job = slurm.submit(sabotaged(tmp_path, data, "error", starts=99), tmp_path / "run")
    ended = slurm.ended(job)
    print(slurm.log(job))
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "1:0")
    assert "the training ended with exit code 1" in slurm.log(job)
    assert ended["Restarts"] == "0"


def test_bad_arguments_end_the_job_with_2(slurm, tmp_path, data):
    path = write_config(bare_config(data), tmp_path)
    job = slurm.submit(path, tmp_path / "run", "--config.training.num_step=3")
    ended = slurm.ended(job)
    print(slurm.log(job))
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")


def test_a_process_that_is_killed_is_started_again_and_the_run_ends_well(slurm, tmp_path, data):
    job = slurm.submit(sabotaged(tmp_path, data, "kill", starts=1), tmp_path / "run")
    ended = slurm.ended(job)
    print(slurm.log(job))
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    assert "was killed or crashed" in slurm.log(job)
    assert metrics(tmp_path / "run")[-1]["step"] == 600


def test_a_process_that_is_always_killed_is_not_started_for_ever(slurm, tmp_path, data):
    path = sabotaged(tmp_path, data, "kill", starts=99, awaited="metrics.jsonl")
    job = slurm.submit(path, tmp_path / "run", STABLELM_STARTS_WITHOUT_PROGRESS="2")
    ended = slurm.ended(job, seconds=1200)
    print(slurm.log(job))
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "1:0")
    assert "2 starts in a row have left no newer checkpoint" in slurm.log(job)
