"""Several hosts without any: what they vote is made up."""

from types import SimpleNamespace

import numpy as np
import pytest

from stablelm_jax.training import slow_hosts
from stablelm_jax.training.slow_hosts import LINES, SlowHosts


@pytest.fixture
def hosts(monkeypatch):
    """(SlowHosts of four processes, the events that it tells)."""
    told = []
    names = ["node0", "node1", "node2", "node3"]
    monkeypatch.setattr(slow_hosts.distributed, "gathered", lambda name: names)
    events = SimpleNamespace(tell=lambda *text, **fields: told.append((text, fields)))
    return SlowHosts(events), told


def lines(hosts, seconds, count, first=1):
    found = []
    for step in range(first, first + count):
        for scale in (0.5, 1.5):  # two steps a line
            hosts.add(scale * np.float32(seconds))
        found.append(hosts.line(2 * step, step_seconds=1.0))
    return found


def test_the_slowest_host_and_its_distance_from_the_others_are_metrics(hosts):
    hosts, told = hosts
    (line,) = lines(hosts, [0.01, 0.02, 0.72, 0.03], 1)
    assert line["step_seconds/slowest_host"] == 2
    assert line["step_seconds/spread"] == pytest.approx(0.7)
    assert not told


def test_a_host_that_is_slow_for_long_is_told_once_by_name(hosts):
    hosts, told = hosts
    lines(hosts, [0.01, 0.02, 0.72, 0.03], 3 * LINES)
    (((event, text), fields),) = told
    assert event == "slow_host" and fields == {"step": 2 * LINES, "process": 2}
    assert "process 2 (node2) holds the others up" in text and "0.72 s, the others 0.02 s" in text


def test_no_host_is_told_that_is_slow_by_little_or_now_and_then(hosts):
    hosts, told = hosts
    lines(hosts, [0.50, 0.51, 0.52, 0.90], 2 * LINES)  # not twice the others
    lines(hosts, [0.01, 0.01, 0.01, 0.09], 2 * LINES)  # not a tenth of a step
    for _ in range(3):
        lines(hosts, [0.01, 0.01, 0.01, 0.90], LINES - 1)
        lines(hosts, [0.90, 0.01, 0.01, 0.01], 1)
    assert not told


def test_one_process_alone_says_nothing():
    assert SlowHosts(None).line(1, 1.0) == {}
