"""Several processes, one program: who takes part, and do all of them run the same thing.

`find_processes` reads the place of this process from flags, SLURM or a Cloud TPU; `start` starts
jax among all. From then on the devices carry what processes ask each other, and each that waits
long says for whom.
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
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax._src.distributed import global_state  # its key-value store has no public name
from jax.experimental import multihost_utils

from stablelm_jax.parallel.meeting import MeetingError, Processes

# How long a host may come later than another; machines of a large job do not boot alike.
MEETING_SECONDS = float(os.environ.get("STABLELM_MEETING_SECONDS") or "60")
DEFAULT_PORT = 8476
METADATA_HOST = "metadata.google.internal"  # tells a machine of Google's about itself


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
    place = re.fullmatch(r"(\[[^\[\]\s]+\]|[^\[\]:/\s]+):([0-9]{1,5})", coordinator)
    if not place or not 0 < int(place[2]) < 65535:
        raise MeetingError(
            f"--coordinator {coordinator!r}: write HOST:PORT, as in node07:8476 or [::1]:8476; a "
            "port is a number from 1 to 65534"
        )
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


def start(processes: Processes) -> None:
    """Starts jax among processes that have met."""
    if (jax.config.jax_platforms or "").split(",")[0] == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator_address=processes.coordinator,
        num_processes=processes.count,
        process_id=processes.index,
        initialization_timeout=int(MEETING_SECONDS),
    )


def is_first() -> bool:
    """Whether this process writes the files and talks to the user."""
    return jax.process_index() == 0


# `multihost_utils` gives back what it was given where there is one process alone.


def from_first(arrays: Any) -> Any:
    """Process 0's arrays (a tree of them, of shapes that all have), on every process."""
    with _together():
        return jax.tree.map(np.array, multihost_utils.broadcast_one_to_all(arrays))


def anywhere(value: bool) -> bool:
    """Whether the value is true on any process."""
    with _together():
        return bool(multihost_utils.process_allgather(np.array(value)).any())


def gathered(value: Any) -> list[Any]:
    """The JSON value that each process gives, by index."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    with _together():
        sizes = multihost_utils.process_allgather(np.int32(len(data)))
        sent = np.zeros(max(sizes), np.uint8)
        sent[: len(data)] = data
        rows = multihost_utils.process_allgather(sent)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


@contextlib.contextmanager
def together_or_not(caught: Any = (ValueError, OSError)) -> Iterator[None]:
    """An error inside on any of several processes becomes a MeetingError on all, naming who."""
    problem = ""
    try:
        yield
    except caught as error:
        if jax.process_count() == 1:
            raise
        problem = str(error) or repr(error)
    said: dict[str, list[str]] = {}
    for index, (host, text) in enumerate(gathered([socket.gethostname(), problem])):
        said.setdefault(text, []).append(f"{index} ({host})")
    told = [f"process(es) {', '.join(who[:9])}: {text}" for text, who in said.items() if text]
    if told:
        raise MeetingError("; ".join(told[:4]))


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
            devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
            devices = np.array(devices).reshape(jax.process_count(), -1)
            mesh = jax.sharding.Mesh(devices, ("process", "local"))
            self._place = jax.NamedSharding(mesh, jax.P("process"))
            self._share = jax.jit(lambda x: x, out_shardings=jax.NamedSharding(mesh, jax.P()))

    def gathered(self, *values: float) -> np.ndarray:
        """What each process gave LAG calls ago, float32 [processes, values]; zeros before that."""
        given = np.array([values], np.float32)
        if jax.process_count() == 1:
            return given
        with jax.transfer_guard("allow"):
            every = jax.make_array_from_process_local_data(self._place, given)
            self._asked.append(self._share(every))
            if len(self._asked) <= self.LAG:
                return np.zeros((jax.process_count(), len(values)), np.float32)
            return np.asarray(self._asked.popleft())
