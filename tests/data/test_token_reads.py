"""Reading tokens: the right ones, no open files, and patience with a disk that may come back."""

from __future__ import annotations

import errno
import functools
import os
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from absl import logging

from stablelm_jax.data.shards import ShardError, read_tokens
from stablelm_jax.storage import remote


def file_of(path, tokens):
    """A file of these tokens, to read from."""
    np.asarray(tokens, np.int32).tofile(path)
    return types.SimpleNamespace(path=path, read=functools.partial(read_tokens, path))


def test_reads_agree_with_the_map_at_every_position(tmp_path):
    tokens = np.arange(50)
    file = file_of(tmp_path / "a", tokens)
    for start in range(51):
        for stop in range(start, 51):
            read = file.read(start, stop)
            assert read.dtype == np.int32 and read.tolist() == tokens[start:stop].tolist()


def test_a_read_that_the_system_gives_in_pieces_is_put_together(tmp_path, monkeypatch):
    file = file_of(tmp_path / "a", range(100))
    whole = os.preadv

    def pieces(descriptor, buffers, offset):
        return whole(descriptor, [memoryview(buffers[0]).cast("B")[:7]], offset)

    monkeypatch.setattr(os, "preadv", pieces)
    assert file.read(3, 97).tolist() == list(range(3, 97))


def test_a_file_cut_short_after_it_was_opened_is_named_by_the_read(tmp_path):
    file = file_of(tmp_path / "a", range(100))
    file.read(0, 100)
    os.truncate(file.path, 200)
    assert file.read(0, 50).tolist() == list(range(50))
    with pytest.raises(ShardError, match="cut short") as caught:
        file.read(40, 60)
    assert str(file.path) in str(caught.value)


def test_a_file_that_is_gone_before_its_first_read_is_named(tmp_path):
    file = file_of(tmp_path / "a", [1, 0])
    file.path.unlink()
    with pytest.raises(ShardError, match="missing") as caught:
        file.read(0, 1)
    assert str(file.path) in str(caught.value)


def test_no_file_stays_open(tmp_path, monkeypatch):
    file = file_of(tmp_path / "a", [5, 0])
    before = len(os.listdir("/proc/self/fd"))
    assert file.read(0, 1).tolist() == [5]
    failing(monkeypatch, 1, errno.EACCES)
    with pytest.raises(ShardError):
        file.read(0, 1)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def waits(monkeypatch):
    """The waits between tries, as they were asked for; none takes time."""
    asked = []
    monkeypatch.setattr(remote.time, "sleep", asked.append)
    return asked


@pytest.fixture
def warnings(monkeypatch):
    """The warnings in the log."""
    texts = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: texts.append(text % args))
    return texts


def failing(monkeypatch, times, code, call="preadv"):
    """`os.<call>` fails `times` times with `code`, then works; returns how often it was called."""
    works, calls, lock = getattr(os, call), [], threading.Lock()

    def fails(*args, **kwargs):
        with lock:
            calls.append(args)
            if len(calls) <= times:
                raise OSError(code, os.strerror(code))
        return works(*args, **kwargs)

    monkeypatch.setattr(os, call, fails)
    return calls


PASSING = [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.ENOTCONN]


@pytest.mark.parametrize("code", PASSING, ids=lambda code: errno.errorcode[code])
@pytest.mark.parametrize("call", ["preadv", "open"])
def test_a_read_that_fails_for_a_while_gives_the_same_tokens_in_the_end(
    tmp_path, monkeypatch, waits, warnings, code, call
):
    file = file_of(tmp_path / "a", range(100))
    calls = failing(monkeypatch, 4, code, call)
    assert file.read(3, 97).tolist() == list(range(3, 97))
    assert len(calls) == 5
    assert len(waits) == 4 and 7 < sum(waits) < 15
    assert all(later > sooner / 2 for sooner, later in zip(waits, waits[1:]))
    assert warnings == [
        f"{file.path}: cannot be read ({os.strerror(code)}); trying again for up to 15 seconds"
    ]


def test_a_read_that_never_succeeds_says_where_why_and_what_to_do(
    tmp_path, monkeypatch, waits, warnings
):
    file = file_of(tmp_path / "a", [1, 2, 0])
    calls = failing(monkeypatch, 10**9, errno.EIO)
    with pytest.raises(ShardError) as caught:
        file.read(0, 2)
    message = str(caught.value)
    assert message.startswith(f"{file.path}: cannot be read (Input/output error); ")
    assert "look at the disk or the mount" in message and "same command again" in message
    assert len(calls) == 5 and len(warnings) == 1
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EIO


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.ENOENT, errno.EISDIR])
def test_an_error_that_lasts_is_not_waited_for(tmp_path, monkeypatch, waits, code):
    file = file_of(tmp_path / "a", [1, 2, 0])
    calls = failing(monkeypatch, 10**9, code, "open")
    with pytest.raises(ShardError) as caught:
        file.read(0, 2)
    assert str(file.path) in str(caught.value) and "look at" not in str(caught.value)
    assert len(calls) == 1 and not waits


def test_a_file_that_is_gone_when_it_is_tried_again_is_missing(tmp_path, monkeypatch, waits):
    file = file_of(tmp_path / "a", [1, 2, 0])
    file.path.unlink()
    failing(monkeypatch, 1, errno.ESTALE, "open")
    with pytest.raises(ShardError, match="missing"):
        file.read(0, 2)
    assert len(waits) == 1


def test_threads_whose_reads_fail_together_all_get_their_own_tokens(tmp_path, monkeypatch, waits):
    file = file_of(tmp_path / "a", range(1000))
    works = os.preadv
    turn, lock = [0], threading.Lock()

    def every_third_fails(descriptor, buffers, offset):
        with lock:
            turn[0] += 1
            failed = turn[0] % 3 == 0
        if failed:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return works(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", every_third_fails)
    monkeypatch.setattr(remote, "_WAITS", (0.0,) * 50)  # eight threads may meet the third in turn
    with ThreadPoolExecutor(8) as pool:
        reads = list(pool.map(lambda start: file.read(start, start + 10), range(990)))
    assert [read.tolist() for read in reads] == [list(range(n, n + 10)) for n in range(990)]
    assert len(waits) == turn[0] - 990 > 400
