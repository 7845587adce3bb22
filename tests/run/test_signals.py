"""Signals and notices: heard in every phase, acted on once."""

import http.server
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from stablelm_jax.run import signals
from stablelm_jax.run.signals import StopRequest, watch_notices


def until(condition):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("not within 20 s")


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_in_the_loop_is_noted_with_its_time(number):
    with StopRequest() as stop, stop.phase("stepping"):
        assert stop.name is None and stop.seconds_since() == 0
        os.kill(os.getpid(), number)
        until(lambda: stop.name is not None)
        assert stop.name == number.name
        until(lambda: stop.seconds_since() > 0)


def test_of_two_signals_the_first_counts(capsys):
    with StopRequest() as stop, stop.phase("stepping"):
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: stop.name is not None)
        os.kill(os.getpid(), signal.SIGUSR1)
        told = []

        def said():
            told.append(capsys.readouterr().out)
            return "SIGUSR1: stopping already, since SIGTERM" in "".join(told)

        until(said)
        assert stop.name == "SIGTERM"


def test_afterwards_signals_do_what_they_did_before():
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with StopRequest():
        assert [signal.getsignal(number) for number in signals.SIGNALS] != before
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before


def test_a_terminal_that_is_closed_stops_a_run_but_not_under_nohup():
    body = "import os, signal, time\nfrom stablelm_jax.run.signals import StopRequest\n"
    body += "with StopRequest() as stop, stop.phase('stepping'):\n"
    body += "    os.kill(os.getpid(), signal.SIGHUP); time.sleep(0.5); print(stop.name)"
    for nohup, name in ([], "SIGHUP"), (["nohup"], "None"):
        command = [*nohup, sys.executable, "-c", body]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        assert done.stdout.splitlines()[-1] == name


BUSY = """
import sys
from stablelm_jax.run.signals import StopRequest
import numpy as np
with StopRequest() as stop:
    stop.safe = "checkpoint global_step7 is whole"
    with stop.phase("compiling", leave=True):
        print("busy", flush=True)
        np.linalg.eigvals(np.random.default_rng(0).normal(size=(6000, 6000)))
"""


def test_a_signal_in_one_long_call_of_c_ends_the_process_at_once_with_75():
    busy = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True)
    assert busy.stdout.readline() == "busy\n"
    time.sleep(0.5)
    began = time.monotonic()
    busy.send_signal(signal.SIGTERM)
    out, _ = busy.communicate(timeout=60)
    assert busy.returncode == signals.EXIT_STOPPED
    assert time.monotonic() - began < 10  # the call takes minutes
    assert "stopped by SIGTERM while compiling" in out
    assert "checkpoint global_step7 is whole; run the same command again" in out


WAITING = """
import os, signal, time
from stablelm_jax.run.signals import StopRequest
with StopRequest() as stop:
    with stop.phase("saving"):
        os.kill(os.getpid(), signal.SIGTERM)
        while stop.name is None:
            time.sleep(0.01)
        print("saved", flush=True)
    with stop.phase("compiling", leave=True):
        print("never", flush=True)
"""


def test_a_signal_heard_while_saving_ends_the_process_when_it_would_compile():
    done = subprocess.run([sys.executable, "-c", WAITING], capture_output=True, text=True)
    assert done.returncode == signals.EXIT_STOPPED
    assert "saved" in done.stdout and "never" not in done.stdout


@pytest.fixture
def metadata(monkeypatch):
    """A metadata server; its answers by the last part of the path may be changed."""
    answers = {"preempted": "FALSE", "maintenance-event": "NONE"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            if "wait_for_change" in self.path:
                time.sleep(0.05)
            body = answers[self.path.split("?")[0].rsplit("/", 1)[1]].encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    yield answers
    server.shutdown()


@pytest.mark.parametrize(
    ("what", "value"),
    [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")],
)
def test_google_clouds_notices_are_heard_when_they_come(metadata, what, value):
    heard = []
    watch_notices(heard.append)
    time.sleep(0.2)
    assert not heard
    metadata[what] = value
    until(lambda: heard)
    assert heard == [f"Google Cloud's notice {what}={value}"]


def test_elsewhere_nobody_is_asked(monkeypatch):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.setattr(signals, "_PRODUCT", signals.Path("/nowhere"))
    asked = []
    monkeypatch.setattr(signals.threading, "Thread", lambda **arguments: asked.append(arguments))
    watch_notices(asked.append)
    assert not asked
