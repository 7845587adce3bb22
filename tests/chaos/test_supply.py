"""Storage that fails, dies or is slow under a training; and what a long training holds on to."""

from __future__ import annotations

import errno
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import SOURCES, losses, tiny_config, train

from stablelm_jax.checkpoint.reading import read_run
from stablelm_jax.data.shards import ShardError
from stablelm_jax.storage import remote

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """(losses, checksums of the last checkpoint) of a run on storage without a fault."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    _, lines = train(tiny_config(data), workdir)
    return results(workdir, lines)


def results(workdir: Path, lines: list[dict]) -> tuple:
    held_out = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    checksums = read_run(workdir / "checkpoints/global_step12")["checksums"]
    return losses(lines), held_out, checksums


def reads_go_through(monkeypatch, before: Callable[[int, str], None]) -> None:
    """`before` is called ahead of each read of a shard, with its number and path, and may raise."""
    works, numbers = os.preadv, itertools.count(1)

    def read(descriptor, buffers, offset):
        before(next(numbers), os.readlink(f"/proc/self/fd/{descriptor}"))
        return works(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)


def fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_reads_that_fail_now_and_then_leave_every_bit_as_it_was(
    data, undisturbed, tmp_path, monkeypatch
):
    failed = []

    def every_seventh(number, path):
        if number % 7 == 0:
            failed.append(number)
            fail()

    monkeypatch.setattr(remote, "_WAITS", (0.0,) * 4)
    reads_go_through(monkeypatch, every_seventh)
    code, lines = train(tiny_config(data), tmp_path)
    assert code == 0 and len(failed) > 12  # more than one a step
    assert results(tmp_path, lines) == undisturbed


def test_storage_that_dies_ends_the_run_by_name_and_loses_nothing(
    data, undisturbed, tmp_path, monkeypatch, capsys
):
    saved, rows = tmp_path / "checkpoints/global_step4", itertools.count(1)

    def dies_in_the_seventh_batch(number, path):
        if "train-" in path and next(rows) > 6 * 8:
            wait_until(saved.exists)  # the run has gone on to step 6 meanwhile; no other save began
            fail()

    monkeypatch.setattr(remote, "_WAITS", (0.0,) * 4)
    with monkeypatch.context() as patch:
        reads_go_through(patch, dies_in_the_seventh_batch)
        with pytest.raises(ShardError, match="Input/output error.*look at the disk") as caught:
            train(tiny_config(data), tmp_path)
    named = str(caught.value).partition(": ")[0]
    assert named in [str(data / source / "train-00000.bin") for source in SOURCES]
    assert saved.exists() and not list(saved.parent.glob("global_step8*"))
    capsys.readouterr()
    code, lines = train(tiny_config(data), tmp_path)
    assert code == 0 and "resuming from" in capsys.readouterr().out
    assert results(tmp_path, lines) == undisturbed


def wait_until(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.01)


def test_slow_storage_changes_nothing(data, undisturbed, tmp_path, monkeypatch):
    slow = []

    def wait(number, path):
        slow.append(number)
        time.sleep(0.002)

    reads_go_through(monkeypatch, wait)
    _, lines = train(tiny_config(data), tmp_path)
    assert len(slow) > 8 * 12 and results(tmp_path, lines) == undisturbed


def long_run(data: Path, workdir: Path, steps: int, every: int) -> list[dict]:
    """What a run of `steps` held, once every `every` steps; see long_run.py."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(TESTS.parent), str(TESTS)]))
    command = [sys.executable, str(TESTS / "chaos/long_run.py"), data, workdir, steps, every]
    child = subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-2000:]
    return [json.loads(line) for line in (workdir / "usage.jsonl").read_text().splitlines()]


def growth(usage: list[dict], key: str, middle: Callable) -> float:
    """From the second third of a run to its last; in the first all was done for the first time."""
    third = len(usage) // 3
    early, late = usage[third : 2 * third], usage[-third:]
    return middle([line[key] for line in late]) - middle([line[key] for line in early])


# MB. Lines of one third differ by 6 MB either way: malloc. The long run grew by 5.5 MB from its
# second third to its last; Orbax keeps 65 kB a save (lists of signals it waited for), 2 MB of it. A
# train state (1 MB) held at every save would be 33 MB there, a batch (6 kB) at every step 20 MB.
MEMORY_TOLERANCE = 16
# Orbax lets tensorstore read and write that many files at once, a thread each; it starts them one
# by one as ever more of its work happens to overlap, and ends them again.
POOL_THREADS = 128


@pytest.mark.by_hand
@pytest.mark.parametrize(("steps", "every"), [(400, 40), (10_000, 100)])
def test_a_long_run_holds_no_more_at_its_end_than_in_its_middle(data, tmp_path, steps, every):
    """Threads, files, memory; a save in every period, evaluation and picture in every other.

    Threads and files: not one more. A save may be under way when a line is written, so the least
    of the lines of each third counts.
    """
    usage = long_run(data, tmp_path, steps, every)
    assert len(usage) == steps // every
    for line in usage:
        pool = line["names"].get("ts_pool_worker", 0)
        assert pool <= POOL_THREADS
        line["others"] = line["threads"] - pool
    figures = "\n".join(map(str, usage))
    print(figures)
    for key in ("python_threads", "others", "files"):
        assert growth(usage, key, min) <= 0, figures
    for key in ("private", "resident"):
        assert growth(usage, key, statistics.median) <= MEMORY_TOLERANCE, figures
