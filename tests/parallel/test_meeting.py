"""The meeting before jax starts: what is wrong is told on all; the processes are threads here."""

import contextlib
import json
import socket
import threading
import time

import pytest
from ports import free_port

from stablelm_jax.parallel import meeting
from stablelm_jax.parallel.meeting import MeetingError, PeerGone, Processes, meet


@pytest.fixture(autouse=True)
def linger_shortly(monkeypatch):
    monkeypatch.setattr(meeting, "_LINGER_SECONDS", 0.5)


SAME = {"config": {"seed": "1", "steps": "12"}, "code": "k1"}


def hold(*processes, port=None, host="127.0.0.1", seconds=20.0):
    """[(seconds, error or None)] of processes, each {index, count, fingerprints, leaving}."""
    coordinator, outcome = f"{host}:{port or free_port()}", {}

    def attend(number, given):
        given = {"index": number, "count": len(processes), "fingerprints": SAME} | given
        place = Processes(coordinator, given["count"], given["index"], "test")
        began, error = time.monotonic(), None
        try:
            meet(place, given["fingerprints"], seconds, given.get("leaving", ""))
        except MeetingError as caught:
            error = caught
        outcome[number] = (time.monotonic() - began, error)

    threads = [threading.Thread(target=attend, args=item) for item in enumerate(processes)]
    for thread in reversed(threads):  # process 0 comes last: the others must wait for it
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    return [outcome[number] for number in sorted(outcome)]


def all_are_told(outcome, *texts):
    """Soon, though there would be time to wait for others."""
    for seconds, error in outcome:
        assert error is not None and seconds < 8
        for text in texts:
            assert text in str(error)


def test_four_that_agree_go_on():
    assert [error for _, error in hold({}, {}, {}, {})] == [None] * 4


def test_those_who_came_are_all_told_who_is_missing():
    outcome = hold({"count": 4}, {"count": 4, "index": 2}, seconds=1.0)
    all_are_told(outcome, "started on 2 of 4 hosts: missing 1, 3 after 1 s")


@pytest.mark.parametrize("name", SAME)
def test_a_difference_is_named_on_every_host(name):
    outcome = hold({}, {}, {"fingerprints": SAME | {name: "other"}})
    all_are_told(outcome, f"{name} differs: process(es) 2 not as process 0")


def test_of_a_fingerprint_with_parts_those_that_differ_are_named():
    outcome = hold({}, {"fingerprints": SAME | {"config": {"seed": "1", "steps": "13"}}})
    all_are_told(outcome, "config differs: process(es) 1", "(steps: 13, not 12)")


def test_another_count_is_named_as_soon_as_it_is_heard():
    outcome = hold({}, {}, {"count": 4})
    all_are_told(outcome, "process 2 on ", "was started as one of 4, process 0 as one of 3")


def test_an_id_given_twice_is_named_as_soon_as_it_is_heard():
    outcome = hold({}, {}, {"index": 1})
    all_are_told(outcome, "process 1 on ", "is there twice", "its own --process_id")


def test_two_processes_0_are_named_too():
    first, *others = hold({}, {}, {"index": 0})  # one of them listens first
    all_are_told([first, *others], "process 0 on ")
    assert sum("is there twice" in str(error) for _, error in [first, *others]) == 2


@pytest.mark.parametrize("number", [0, 1])
def test_who_cannot_start_tells_the_others_why(number):
    given = [{}, {}]
    given[number] = given[number] | {"leaving": "no config.py here"}
    all_are_told(hold(*given), f"process {number} on ", "cannot start: no config.py here")


def test_one_that_dies_is_named_and_the_others_may_be_started_again():
    port = free_port()

    def come_and_die():
        with contextlib.suppress(OSError):
            for _ in range(100):
                with contextlib.suppress(ConnectionRefusedError):
                    with socket.create_connection(("127.0.0.1", port + 1)) as connection:
                        hello = {"index": 2, "count": 4, "host": "b", "fingerprints": SAME}
                        connection.sendall(json.dumps(hello | {"leaving": ""}).encode() + b"\n")
                        time.sleep(0.3)
                    return
                time.sleep(0.05)

    thread = threading.Thread(target=come_and_die)
    thread.start()
    outcome = hold({"count": 4}, {"count": 4}, port=port)
    thread.join()
    all_are_told(outcome, "process 2 on b was killed or stopped")
    assert all(isinstance(error, PeerGone) for _, error in outcome)


def test_without_a_process_0_the_others_end_too():
    ((_, error),) = hold({"index": 1, "count": 2}, seconds=0.6)
    assert "found no process 0 at 127.0.0.1" in str(error)


def test_a_name_that_does_not_resolve_is_said_to_be_one(monkeypatch):
    monkeypatch.setattr(meeting, "_NAME_SECONDS", 0.2)
    first, second = hold({}, {}, host="no-such-host.invalid")
    all_are_told([first, second], "the name 'no-such-host.invalid' does not resolve")


def test_a_coordinator_on_another_machine_than_process_0_is_noticed(monkeypatch):
    monkeypatch.setattr(meeting, "_NAME_SECONDS", 0.5)
    monkeypatch.setattr(meeting, "_GREETING_SECONDS", 0.2)
    ((_, error),) = hold({"count": 2}, host="192.0.2.1")  # an address that nobody has
    assert "process 0 of 2" in str(error) and "found no process 0 at 192.0.2.1" in str(error)


@pytest.mark.parametrize("taken", [0, 1])
def test_a_port_in_use_is_named_on_every_process(taken, monkeypatch):
    monkeypatch.setattr(meeting, "_GREETING_SECONDS", 0.2)
    monkeypatch.setattr(meeting, "_LINGER_SECONDS", 5.0)
    port = free_port()
    with socket.create_server(("127.0.0.1", port + taken)):  # it accepts and says nothing
        outcome = hold({}, {}, port=port)
    all_are_told(
        outcome, f"process 0 on {socket.gethostname()} cannot listen at port {port + taken}"
    )


STRANGERS = [
    b"",
    b"5\n",
    b"null\n",
    b"[]\n",
    b'"hello"\n',
    b"{}\n",
    b'{"index": [], "count": 2, "host": "a", "fingerprints": {}, "leaving": ""}\n',
    b'{"index": {}, "count": 2, "host": "a", "fingerprints": {}, "leaving": ""}\n',
    b'{"index": true, "count": 2, "host": "a", "fingerprints": {}, "leaving": ""}\n',
    b'{"index": -1, "count": 2, "host": "a", "fingerprints": {}, "leaving": ""}\n',
    b'{"index": 1, "count": "2", "host": "a", "fingerprints": {}, "leaving": ""}\n',
    b'{"index": 1, "count": 2, "host": null, "fingerprints": {}, "leaving": ""}\n',
    b'{"index": 1, "count": 2, "host": "a", "fingerprints": 5, "leaving": ""}\n',
    b'{"index": 1, "count": 2, "host": "a"}\n',
    b"[" * 100_000 + b"\n",
    b"x" * (2 << 20) + b"\n",
    b"\xff\xfe\n",
    b"GET / HTTP/1.0\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01",
]


def test_strangers_who_talk_or_are_silent_neither_end_the_start_nor_delay_it(caplog):
    port, outcome = free_port(), []
    first = threading.Thread(target=lambda: outcome.extend(hold({"count": 2}, port=port)))
    first.start()
    with contextlib.ExitStack() as stack:
        for number, said in enumerate(STRANGERS):
            place = ("127.0.0.1", port + number % 2)
            for _ in range(200):
                with contextlib.suppress(ConnectionRefusedError):
                    stranger = stack.enter_context(socket.create_connection(place))
                    break
                time.sleep(0.02)
            with contextlib.suppress(OSError):  # it may be shown the door while it talks
                stranger.sendall(said)
        time.sleep(0.2)
        assert not outcome
        outcome.extend(hold({"index": 1, "count": 2}, port=port))
        first.join()
    assert [error for _, error in outcome] == [None, None]
    assert all(seconds < 8 for seconds, _ in outcome)
    assert not caplog.records


def test_once_all_may_go_on_nobody_is_heard_at_the_ports_any_more():
    """Others look for jax there at once."""
    port = free_port()
    first = threading.Thread(target=hold, args=({"count": 2},), kwargs={"port": port})
    first.start()
    connections = meet(Processes(f"127.0.0.1:{port}", 2, 1, "test"), SAME, 20.0)
    assert list(connections) == [0]
    for place in (("127.0.0.1", port), ("127.0.0.1", port + 1)):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(place)
    first.join()


def test_processes_meet_at_an_ipv6_address():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("this machine has no IPv6")
    assert [error for _, error in hold({}, {}, host="[::1]")] == [None, None]
