"""Processes of one run, without the run: whoever is gone, the others say so and leave."""

import os
import socket
import subprocess
import sys
import time

import pytest
from ports import free_port

from stablelm_jax.run.signals import EXIT_STOPPED

SCRIPT = """
import os, signal, sys, time
from stablelm_jax.parallel.meeting import Processes, meet
from stablelm_jax.run.peers import Peers
from stablelm_jax.run.signals import StopRequest
coordinator, index, does, whole = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
stop = StopRequest()
stop.whole = lambda: whole
peers = Peers(index, meet(Processes(coordinator, 3, index, "test"), {}, 60.0), stop)
print("met", flush=True)
sys.stdin.readline()
if does == "ends":
    sys.exit(peers.end(0))
if does == "is killed":
    os.kill(os.getpid(), signal.SIGKILL)
if does.isdecimal():
    stop.leave(int(does))
if does == "aborts":  # as jax does where process 0 is gone
    time.sleep(1)
    os.abort()
time.sleep(60)
"""


def three(*deeds, whole="global_step8", **environment):
    """Three processes, once they have met, do this; returns [(exit code, last line)]."""
    coordinator = f"127.0.0.1:{free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, coordinator, str(index), does, whole],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        for index, does in enumerate(deeds)
    ]
    for process in started:
        assert process.stdout.readline() == "met\n"
    began = time.monotonic()
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    ends = [process.communicate(timeout=50)[0] for process in started]
    assert time.monotonic() - began < 40
    return [(p.returncode, out.strip().rpartition("\n")[2]) for p, out in zip(started, ends)]


@pytest.mark.parametrize("index", [0, 2])
def test_a_process_that_is_killed_takes_the_others_along_with_its_name(index):
    # Where it is process 0, jax aborts the others, who still leave in good order.
    deeds = ["aborts" if index == 0 else "waits"] * 3
    deeds[index] = "is killed"
    ends = three(*deeds)
    assert ends.pop(index)[0] == -9
    for code, line in ends:
        assert code == EXIT_STOPPED
        assert f"process {index}" in line and "is gone, killed or with its machine" in line
        assert "; checkpoint global_step8 is whole; run the same command again" in line


def test_without_a_whole_checkpoint_it_is_an_error():
    (_, (code, line), _) = three("is killed", "waits", "waits", whole="")
    assert code == 1 and "nothing had begun" in line


def test_before_a_first_checkpoint_a_launch_script_is_told_to_start_it_again():
    ends = three("is killed", "waits", "waits", whole="", STABLELM_STARTED_AGAIN="yes")
    assert [code for code, _ in ends] == [-9, EXIT_STOPPED, EXIT_STOPPED]


def test_a_process_that_fails_ends_the_others_with_an_error_and_no_advice():
    host = socket.gethostname()
    (first, (code, line), third) = three("waits", "waits", "1")
    assert third[0] == 1 and code == first[0] == 1
    assert line == (
        f"process 2 ({host}) ended with an error, which its own output tells; checkpoint "
        "global_step8 is whole"
    )


def test_a_process_that_stops_at_once_stops_the_others():
    assert [code for code, _ in three("75", "waits", "waits")] == [75, 75, 75]


def test_processes_that_come_to_the_end_together_say_nothing():
    assert three("ends", "ends", "ends") == [(0, "")] * 3
