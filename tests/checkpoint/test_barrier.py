"""Where one process fails in a save, those that wait for it hear so at once."""

from types import SimpleNamespace

import pytest
from jax import errors

from stablelm_jax.checkpoint import barrier
from stablelm_jax.checkpoint.barrier import FailedElsewhere, SaveBarrier


class Client:
    """jax's coordination client of one process among two, the other of which is as far already."""

    def __init__(self):
        self.told, self.waited = {}, []

    def key_value_dir_get(self, folder):
        return [(key, text) for key, text in self.told.items() if key.startswith(folder)]

    def key_value_set(self, key, text, allow_overwrite):
        self.told[key] = text

    def wait_at_barrier(self, name, timeout_ms):
        self.waited.append(name)


class AtOnce:
    """A thread that does its work when it is started."""

    def __init__(self, target, args, daemon):
        self.start = lambda: target(*args)


@pytest.fixture
def client(monkeypatch):
    jax = SimpleNamespace(process_count=lambda: 2, process_index=lambda: 1, errors=errors)
    monkeypatch.setattr(barrier, "jax", jax)
    monkeypatch.setattr(barrier, "global_state", SimpleNamespace(client=Client()))
    monkeypatch.setattr(barrier.threading, "Thread", AtOnce)
    return barrier.global_state.client


def test_a_process_that_fails_comes_to_the_barrier_at_which_the_others_wait(client):
    one, other = SaveBarrier(), SaveBarrier()
    for process in (one, other):
        process.begin()
        process(key="written", timeout_ms=1)
    one.fail("No space left on device")
    with pytest.raises(FailedElsewhere, match="process 1 .*: No space left on device"):
        other(key="renamed", timeout_ms=1)
    assert client.waited[-2:] == [client.waited[-1]] * 2


def test_the_next_try_has_barriers_of_its_own_and_does_not_fail(client):
    process = SaveBarrier()
    process.begin()
    process.fail("Permission denied")
    process.begin()
    process(key="written", timeout_ms=1)
    assert len(set(client.waited)) == 2
