"""Who takes part in a run, and what processes do together; how they meet: test_meeting.py."""

import os
import socket
import subprocess
import sys

import pytest

from stablelm_jax.parallel.distributed import (
    MeetingError,
    find_processes,
    first_host,
)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("h:1", None, 0), "--num_processes: missing"),
        (("h:1", 2, 2), "process 2 of 2"),
        (("h", 2, 0), "write HOST:PORT"),
        (("h:x", 2, 0), "write HOST:PORT"),
        ((":8476", 2, 0), "write HOST:PORT"),
        (("h:0", 2, 0), "a number from 1 to 65534"),
        (("h:65535", 2, 0), "a number from 1 to 65534"),
        (("h:84760000", 2, 0), "write HOST:PORT"),
        (("::1:8476", 2, 0), r"as in node07:8476 or \[::1\]:8476"),
        (("[::1]", 2, 0), "write HOST:PORT"),
        (("http://h:8476", 2, 0), "write HOST:PORT"),
        (("h :8476", 2, 0), "write HOST:PORT"),
        (("h:8476", 2, -1), "process -1 of 2"),
        ((None, None, 0), "--coordinator, --num_processes: missing"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(arguments, said):
    with pytest.raises(MeetingError, match=said):
        find_processes(*arguments)


def test_the_brackets_of_an_ipv6_address_are_not_part_of_it():
    assert find_processes("[fe80::1]:8476", 2, 1).meeting_place == ("fe80::1", 8477)
    assert find_processes("node07.cluster:8476", 2, 1).meeting_place == ("node07.cluster", 8477)


def clean(monkeypatch, **values):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name in ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_a_task_of_srun_finds_its_place(monkeypatch):
    clean(
        monkeypatch,
        SLURM_NTASKS="16",
        SLURM_PROCID="3",
        SLURM_STEP_NODELIST="gpu[07-08]",
        SLURM_JOB_ID="4097",
    )
    found = find_processes()
    assert (found.count, found.index, found.coordinator) == (16, 3, "gpu07:8478")


def test_the_tasks_are_those_of_the_step_not_of_the_whole_job(monkeypatch):
    step = {"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_JOB_ID": "3"}
    clean(monkeypatch, SLURM_NTASKS="16", SLURM_STEP_NUM_TASKS="2", **step)
    assert find_processes().count == 2
    # An interactive shell inside the job.
    clean(monkeypatch, SLURM_NTASKS="16", SLURM_STEP_NUM_TASKS="1", **step)
    assert find_processes() is None


def test_two_steps_of_one_job_do_not_share_a_port(monkeypatch):
    step = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a[1-2]"}
    found = set()
    for number in ("0", "1"):
        clean(monkeypatch, SLURM_JOB_ID="3", SLURM_STEP_ID=number, **step)
        found.add(find_processes().coordinator)
    assert len(found) == 2


@pytest.mark.parametrize(
    "empty", ["SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST", "TPU_WORKER_ID"]
)
def test_an_empty_variable_is_as_one_that_is_not_set(monkeypatch, empty):
    slurm = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "a[1-2]"}
    tpu = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}
    clean(monkeypatch, **(slurm if empty in slurm else tpu) | {empty: ""})
    assert find_processes() is None
    clean(monkeypatch, **slurm, SLURM_STEP_NUM_TASKS="", SLURM_JOB_ID="", SLURM_STEP_ID="")
    assert find_processes().count == 2


@pytest.mark.parametrize(
    "values, said",
    [
        ({"SLURM_NTASKS": "two"}, "SLURM_NTASKS='two' is not a number"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "2"}, "SLURM_PROCID=2 of 2 tasks"),
        ({"TPU_WORKER_ID": "w-1", "TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_ID='w-1'"),
    ],
)
def test_variables_that_make_no_sense_are_refused_by_name(monkeypatch, values, said):
    clean(monkeypatch, SLURM_STEP_NODELIST="a[1-2]", **values)
    with pytest.raises(MeetingError, match=said):
        find_processes()


def test_a_worker_of_a_tpu_slice_finds_its_place(monkeypatch):
    clean(monkeypatch, TPU_WORKER_HOSTNAMES="10.0.0.1,10.0.0.2", TPU_WORKER_ID="1")
    found = find_processes()
    assert (found.count, found.index, found.coordinator) == (2, 1, "10.0.0.1:8476")


def test_one_process_alone_is_none(monkeypatch):
    clean(monkeypatch, SLURM_NTASKS="1", SLURM_PROCID="0", SLURM_STEP_NODELIST="a")
    assert find_processes() is None


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("a[03-05,9],b", "a03"),
        ("a03,a04", "a03"),
        ("node", "node"),
        ("rack1-gpu[7]", "rack1-gpu7"),
        ("a[1-2].local", "a1.local"),
        ("a[1-3,5]-ib,b", "a1-ib"),
        ("rack[2-3]node[05-08,11],c", "rack2node05"),
        ("[07-09]", "07"),
        ("10.0.0.1,10.0.0.2", "10.0.0.1"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", ",a", "a[1-2", "a[]", "a]b"])
def test_a_node_list_that_names_no_host_is_refused(nodes):
    with pytest.raises(MeetingError, match="names no host"):
        first_host(nodes)


AWAITED = """
import sys, time, jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
from stablelm_jax.parallel import distributed
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
distributed._TELL_SECONDS = 0.3
me = int(sys.argv[2])
assert distributed.gathered({"é": me * [1]}) == [{"é": []}, {"é": [1]}]
try:
    with distributed.together_or_not():
        open("/nowhere/at/all") if me else None
except distributed.MeetingError as error:
    assert str(error).startswith("process(es) 1 (") and "/nowhere/at/all" in str(error), error
else:
    raise AssertionError("went on")
time.sleep(1.5 * me)
assert distributed.anywhere(me == 1)
"""


def test_who_waits_long_says_for_whom():
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", AWAITED, address, str(index)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    first, second = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], first + second
    assert f"process 0: waiting for process 1 ({socket.gethostname()}), for " in first
    assert "waiting" not in second
