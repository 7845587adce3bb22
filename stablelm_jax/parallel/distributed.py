"""Several processes, one program: who takes part, and do all of them run the same thing.

`find_processes` reads the place of this process from flags, SLURM or a Cloud TPU. Before jax
starts, `meet` counts the processes and compares what they are about to run: jax itself waits for
missing hosts and then aborts from C++, and hosts of different code or data hang in a collective.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax._src.distributed import global_state  # its key-value store has no public name
from jax.experimental import multihost_utils

# How long a host may come later than another; machines of a large job do not boot alike.
MEETING_SECONDS = float(os.environ.get("STABLELM_MEETING_SECONDS", "60"))
DEFAULT_PORT = 8476
METADATA_HOST = "metadata.google.internal"  # tells a machine of Google's about itself


class MeetingError(ValueError):
    """Not every process came, or they are not about to run the same thing."""


class Processes(NamedTuple):
    """The place of this process among all."""

    coordinator: str  # HOST:PORT of process 0, for jax; the meeting takes the port after it
    count: int
    index: int  # from 0
    found_in: str  # where this was read, for messages

    @property
    def meeting_place(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host, int(port) + 1


def find_processes(
    coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> Processes | None:
    """From the arguments, else from SLURM, else from a Cloud TPU's metadata; None: just this one.

    Raises:
      MeetingError: only some of the arguments are given, or they do not fit together.
    """
    given = {"--coordinator": coordinator, "--num_processes": count, "--process_id": index}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        if len(missing) < len(given):
            raise MeetingError(f"{', '.join(missing)}: missing; the three belong together")
        return _from_slurm() or _from_tpu()
    if not 0 <= index < count:
        raise MeetingError(f"process {index} of {count}: count --process_id from 0")
    port = re.fullmatch(r".+:(\d+)", coordinator)
    if not port or not 0 < int(port[1]) < 65535:
        raise MeetingError(f"--coordinator {coordinator!r}: write HOST:PORT, a port below 65535")
    return Processes(coordinator, count, index, "flags")


def _from_slurm() -> Processes | None:
    """One process a task of `srun`; a batch script alone, without srun, is no such task.

    The step's own number comes first: an interactive shell is one task of a larger job.
    """
    count = _number("SLURM_STEP_NUM_TASKS") or _number("SLURM_NTASKS") or 1
    index, nodes = _number("SLURM_PROCID"), os.environ.get("SLURM_STEP_NODELIST")
    if count < 2 or index is None or not nodes:
        return None
    if index >= count:
        raise MeetingError(f"SLURM_PROCID={index} of {count} tasks: srun started another step")
    # Jobs that share a node must not share a port, nor must the steps of one job.
    number = (_number("SLURM_JOB_ID") or 0) + 64 * (_number("SLURM_STEP_ID") or 0)
    port = DEFAULT_PORT + 2 * (number % 4096)
    return Processes(f"{first_host(nodes)}:{port}", count, index, "SLURM")


def _number(name: str, text: str | None = None) -> int | None:
    """`text`, else the variable of the environment; None where it is empty or not set."""
    text = (os.environ.get(name, "") if text is None else text).strip()
    if text and not text.isdecimal():
        raise MeetingError(f"{name}={text!r} is not a number; give --coordinator")
    return int(text) if text else None


def first_host(nodes: str) -> str:
    """The first of a SLURM node list: 'a[03-05,9]-ib,b' -> 'a03-ib', 'r[1-2]n[7,9]' -> 'r1n7'."""
    match = re.match(r"([^,\[\]\s]|\[\d+[^\[\]]*\])+(?=,|$)", nodes.strip())
    if not match:
        raise MeetingError(f"SLURM_STEP_NODELIST {nodes!r} names no host; give --coordinator")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[0])


def _from_tpu() -> Processes | None:
    """The workers of a slice, from what its machines set or their metadata server says."""
    if {"TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"} <= os.environ.keys():
        hosts = os.environ["TPU_WORKER_HOSTNAMES"].split(",")
        number = _number("TPU_WORKER_ID")
    elif os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0"):
        # Each endpoint reads NAME:PORT:ADDRESS.
        endpoints = _metadata("worker-network-endpoints").split(",")
        hosts = [endpoint.split(":")[-1] for endpoint in endpoints]
        number = _number("agent-worker-number", _metadata("agent-worker-number"))
    else:
        return None
    if len(hosts) < 2 or number is None:
        return None
    return Processes(f"{hosts[0]}:{DEFAULT_PORT}", len(hosts), number, "the TPU's metadata")


def metadata_request(path: str, host: str = METADATA_HOST) -> urllib.request.Request:
    """Asks the metadata server of Google's machines about this one."""
    url = f"http://{host}/computeMetadata/v1/instance/{path}"
    return urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})


def _metadata(name: str) -> str:
    """Empty where there is no server or no such attribute; urllib's errors are OSErrors."""
    with contextlib.suppress(OSError):
        with urllib.request.urlopen(metadata_request(f"attributes/{name}"), timeout=2) as answer:
            return answer.read().decode()
    return ""


def start(processes: Processes, fingerprints: Mapping[str, str]) -> None:
    """Meets the other processes and starts jax among them; `MeetingError` as `meet`."""
    meet(processes, fingerprints)
    if (jax.config.jax_platforms or "").split(",")[0] == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator_address=processes.coordinator,
        num_processes=processes.count,
        process_id=processes.index,
        initialization_timeout=int(MEETING_SECONDS),
    )


def meet(
    processes: Processes, fingerprints: Mapping[str, str], seconds: float = MEETING_SECONDS
) -> None:
    """Returns once every process has come with the same fingerprints.

    Each of the others sends process 0 one line of JSON and gets one back, with what is wrong.

    Args:
      fingerprints: what must be the same everywhere, by name.

    Raises:
      MeetingError: on every process: someone is missing after `seconds`, or differs.
    """
    attend = _host_meeting if processes.index == 0 else _attend_meeting
    if problem := attend(processes, dict(fingerprints), seconds):
        raise MeetingError(problem)


def _host_meeting(processes: Processes, fingerprints: dict[str, str], seconds: float) -> str | None:
    """Process 0 hears the others and tells them what is wrong, or None."""
    deadline = time.monotonic() + seconds
    present, guests = {0: fingerprints}, []
    port = processes.meeting_place[1]
    try:
        server = socket.create_server(("", port), backlog=processes.count)
    except OSError as error:
        raise MeetingError(
            f"port {port} of {processes.coordinator} is taken ({error}); another run? choose "
            "another --coordinator port"
        ) from error
    with contextlib.ExitStack() as connections:
        connections.enter_context(server)
        while len(present) < processes.count and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                guests.append(connections.enter_context(server.accept()[0]))
                guests[-1].settimeout(max(0.01, deadline - time.monotonic()))
                said = _read(guests[-1])
                if said["count"] == processes.count:
                    present[said["index"]] = said["fingerprints"]
            except (OSError, ValueError, TypeError, KeyError):
                continue  # a port scanner, or a process that died: it is missing
        problem = _problem(processes, present, seconds)
        for guest in guests:
            with contextlib.suppress(OSError):
                guest.sendall(_line({"error": problem}))
    return problem


def _problem(processes: Processes, present: dict[int, dict], seconds: float) -> str | None:
    if missing := sorted(set(range(processes.count)) - set(present)):
        return (
            f"started on {len(present)} of {processes.count} hosts: missing "
            f"{', '.join(map(str, missing))} after {seconds:.0f} s ({processes.found_in}); see "
            "their own output"
        )
    for name, value in present[0].items():
        others = [index for index, prints in sorted(present.items()) if prints.get(name) != value]
        if others:
            return (
                f"{name} differs: process(es) {', '.join(map(str, others))} not as process 0; "
                f"give every host the same {name}"
            )
    return None


def _attend_meeting(
    processes: Processes, fingerprints: dict[str, str], seconds: float
) -> str | None:
    """Another process tells process 0 what it is about to run, and gives back the answer."""
    hello = {"index": processes.index, "count": processes.count, "fingerprints": fingerprints}
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection(processes.meeting_place, timeout=1) as host:
                # Process 0 answers at its own deadline: it may have started later than this one.
                host.settimeout(seconds + 5)
                host.sendall(_line(hello))
                return _read(host)["error"]
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline:
                raise MeetingError(
                    f"process {processes.index} of {processes.count} found no process 0 at "
                    f"{processes.coordinator} within {seconds:.0f} s ({error}); is it running?"
                ) from error
            time.sleep(0.2)


def _line(message: dict) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _read(connection: socket.socket) -> dict:
    with connection.makefile("rb") as stream:
        return json.loads(stream.readline(1 << 20))  # a stranger may send without end


def is_first() -> bool:
    """Whether this process writes the files and talks to the user."""
    return jax.process_index() == 0


# `multihost_utils` gives back what it was given where there is one process alone.


def agreed(value: bool) -> bool:
    """Process 0's value, on every process."""
    with _together():
        return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def anywhere(value: bool) -> bool:
    """Whether the value is true on any process."""
    with _together():
        return bool(multihost_utils.process_allgather(np.array(value)).any())


def agreed_numbers(values: Sequence[int]) -> list[int]:
    """Process 0's whole numbers, below 2**31, on every process."""
    with _together():
        count = int(multihost_utils.broadcast_one_to_all(np.int32(len(values))))
        sent = np.zeros(count, np.int32)
        if is_first():
            sent[:] = values
        return multihost_utils.broadcast_one_to_all(sent).tolist()


_ARRIVED = "stablelm_jax/arrived"  # the folder of keys: the last thing each process came to
_TELL_SECONDS = 10.0  # a wait for other processes that is longer than this is told
_numbers = itertools.count(1)  # of what all processes do together, in the same order everywhere


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Around what waits for all processes: each that waits long says whom it waits for.

    The wait itself stays with the devices, which notice at once when a process is gone.
    """
    number, ended = next(_numbers), threading.Event()
    if jax.process_count() > 1:
        arrived = f"{number} {socket.gethostname()}"
        key = f"{_ARRIVED}/{jax.process_index()}"
        global_state.client.key_value_set(key, arrived, allow_overwrite=True)
        threading.Thread(target=_tell_awaited, args=(number, ended), daemon=True).start()
    try:
        with jax.transfer_guard("allow"):
            yield
    finally:
        ended.set()


def _tell_awaited(number: int, ended: threading.Event) -> None:
    began, pause = time.monotonic(), _TELL_SECONDS
    with contextlib.suppress(Exception):  # the runtime's, which goes down with process 0
        while not ended.wait(pause):
            found = dict(global_state.client.key_value_dir_get(f"{_ARRIVED}/"))
            awaited = []
            for index in range(jax.process_count()):
                last, _, host = found.get(f"{_ARRIVED}/{index}", "0 ").partition(" ")
                if int(last) < number:
                    awaited.append(f"{index} ({host})" if host else str(index))
            if awaited:
                seconds = time.monotonic() - began
                who = f"process {jax.process_index()}: waiting for process {', '.join(awaited)}"
                print(f"{who}, for {seconds:.0f} s so far", file=sys.stderr, flush=True)
            pause = min(2 * pause, 300.0)


class Agreement:
    """Asks all processes, at every step, without making any of them wait for its devices.

    The answer is the one to the question of LAG calls before: by then it has long been there, as
    it was computed in its turn among the steps. Every process gets the same answer at the same
    call. One process alone gets it at once.
    """

    LAG = 2

    def __init__(self) -> None:
        self._asked: collections.deque[jax.Array] = collections.deque()
        if jax.process_count() > 1:
            devices = np.array(jax.devices()).reshape(jax.process_count(), -1)
            mesh = jax.sharding.Mesh(devices, ("process", "local"))
            self._place = jax.NamedSharding(mesh, jax.P("process"))
            self._any = jax.jit(lambda x: x.any(0), out_shardings=jax.NamedSharding(mesh, jax.P()))

    def anywhere(self, *values: bool) -> list[bool]:
        """Of each value, whether it was true on any process LAG calls ago; false before that."""
        if jax.process_count() == 1:
            return list(values)
        with jax.transfer_guard("allow"):
            given = np.array([values], bool)
            every = jax.make_array_from_process_local_data(self._place, given)
            self._asked.append(self._any(every))
            if len(self._asked) <= self.LAG:
                return [False] * len(values)
            return np.asarray(self._asked.popleft()).tolist()
