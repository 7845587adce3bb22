"""A lock file keeps others away, of any machine, while its holder lives and no longer."""

import contextlib
import fcntl
import itertools
import multiprocessing
import os
import signal
import socket
import threading

import pytest

from stablelm_jax.preparation import lock
from stablelm_jax.preparation.lock import only_one


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.02)
    monkeypatch.setattr(lock, "_WATCH_SECONDS", 0.3)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lock"


def hold(path, begun):
    with only_one(path):
        begun.set()
        signal.pause()


@pytest.fixture
def holder(path):
    """A process of this machine that holds the lock."""
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    process = context.Process(target=hold, args=(path, begun), daemon=True)
    process.start()
    assert begun.wait(60)
    yield process
    process.kill()
    process.join()


def test_who_comes_second_learns_who_holds_it_and_waits_for_nothing(path, holder):
    with pytest.raises(BlockingIOError, match=f"process {holder.pid} on {socket.gethostname()}"):
        with only_one(path):
            pass


def test_a_lock_of_a_killed_process_holds_nobody_up(path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert str(holder.pid) in path.read_text()
    with only_one(path):
        pass
    assert not path.exists()


def test_a_holder_on_another_machine_counts_as_long_as_its_counter_moves(path):
    line, stop = "otherhost 7 2026-01-01T00:00:00 {:09d}", threading.Event()
    path.write_text(line.format(0))

    def live():
        with open(path, "r+b", buffering=0) as file:
            for count in itertools.count(1):
                os.pwrite(file.fileno(), line.format(count).encode(), 0)
                if stop.wait(0.02):
                    return

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(BlockingIOError, match="process 7 on otherhost, since 2026"):
            with only_one(path):
                pass
    finally:
        stop.set()
        thread.join()


def test_a_dead_holder_on_another_machine_is_found_dead(path):
    path.write_text("other-host-of-a-long-name.example 7 2026-01-01T00:00:00 3")
    with only_one(path):
        host, process, _, count = path.read_text().split(" ")
        assert (host, process) == (socket.gethostname(), str(os.getpid())) and count.isdecimal()


def test_a_disk_without_locks_is_guarded_by_the_counter_alone(path, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with only_one(path), contextlib.ExitStack() as second:
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on"):
            second.enter_context(only_one(path))
    with only_one(path):
        pass
