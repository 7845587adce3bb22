"""Processes meet before jax starts: are all there, and about to run the same thing?

jax aborts from C++ where a process is missing or an id is given twice, lets a count that differs
pass, and processes of different code hang in a collective. Here each of the others sends process 0
a line of JSON, and gets one back with what is wrong, as soon as that is known. Process 0 listens at
two ports, the one after jax's and jax's own: that one of them is taken is told at the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

_GREETING = b"stablelm_jax\n"  # what process 0 says to whoever connects
_GREETING_SECONDS = 3.0  # in which it does
_LINE_SECONDS = 10.0  # in which another has to say who it is
_NAME_SECONDS = 10.0  # in which a name server may come up, and process 0 has to find itself
_LINGER_SECONDS = 5.0  # those who come so long after a failure still hear of it
_LONGEST = 1 << 20  # bytes of a line


class MeetingError(ValueError):
    """The processes cannot run together; all who came are told why."""


class PeerGone(MeetingError):
    """One was killed or stopped: all of them, started again, may well go on."""


class Processes(NamedTuple):
    """The place of this process among all."""

    coordinator: str  # HOST:PORT of process 0, for jax; the meeting takes the port after it
    count: int
    index: int  # from 0
    found_in: str  # where this was read, for messages

    @property
    def meeting_place(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port) + 1


def meet(
    processes: Processes,
    fingerprints: Mapping[str, Any],
    seconds: float,
    leaving: str = "",
) -> dict[int, socket.socket]:
    """Returns once every process has come with the same fingerprints.

    Args:
      fingerprints: what must be the same everywhere: {name: text} or {name: {part: text}}.
      seconds: how much later than another a process may come.
      leaving: why this process does not take part, for the others to hear.

    Returns:
      By index, connections that stay: of process 0 to each of the others, of these to process 0.

    Raises:
      MeetingError: on every process, with what is wrong on which of them.
    """
    hello = {"index": processes.index, "count": processes.count, "host": socket.gethostname()}
    hello |= {"fingerprints": dict(fingerprints), "leaving": leaving}
    if processes.index == 0:
        answer, connections = asyncio.run(_Meeting(processes).hold(hello, seconds))
    else:
        answer, connection = _attend(processes, hello, seconds)
        connections = {0: connection}
    if answer["error"]:
        raise (PeerGone if answer["gone"] else MeetingError)(answer["error"])
    return connections


_Answer = tuple[dict[str, Any], socket.socket]  # what process 0 says, and the connection to it


def _attend(processes: Processes, hello: dict[str, Any], seconds: float) -> _Answer:
    """Tells process 0 what this one is about to run, and gives back the answer."""
    began, (host, port) = time.monotonic(), processes.meeting_place
    for attempt in itertools.count():
        patience = seconds if processes.index else min(seconds, _NAME_SECONDS)
        try:
            return _ask((host, port - attempt % 2), hello, seconds)
        except MeetingError:
            raise
        except (socket.gaierror, UnicodeError) as error:
            patience = min(seconds, _NAME_SECONDS)
            why = f"the name {host!r} does not resolve: {error}"
        except OSError as error:
            why = f"{error}; it has to run there"
        if time.monotonic() - began > patience:
            break
        time.sleep(0.1)
    raise MeetingError(
        f"process {processes.index} of {processes.count} on {hello['host']} found no process 0 at "
        f"{processes.coordinator} ({processes.found_in}) within {patience:.0f} s: {why}"
    )


def _ask(place: tuple[str, int], hello: dict[str, Any], seconds: float) -> _Answer:
    """The answer of process 0; OSError: it is not there, now."""
    with socket.create_connection(place, timeout=_GREETING_SECONDS) as connection:
        if connection.getsockname() == connection.getpeername():  # TCP may meet itself
            raise ConnectionError("nobody listens")
        with connection.makefile("rb") as stream:
            if stream.readline(_LONGEST) != _GREETING:
                raise ConnectionError(f"something else answers at port {place[1]}")
            connection.sendall(_line(hello))
            connection.settimeout(seconds + _LINE_SECONDS)
            answer = stream.readline(_LONGEST)
        if answer:
            return json.loads(answer), connection.dup()
    raise PeerGone(f"process 0 at {place[0]} went away before the run began; start all again")


class _Meeting:
    """What process 0 hears and answers. All are heard at once: a stranger delays nobody."""

    def __init__(self, processes: Processes):
        self._processes = processes
        self._present: dict[int, dict[str, Any]] = {}  # what each process says
        self._connections: dict[int, socket.socket] = {}  # to each that has its answer
        self._problem, self._gone, self._decided = "", False, False
        self._waiting = self._answered = 0

    async def hold(
        self, hello: dict[str, Any], seconds: float
    ) -> tuple[dict[str, Any], dict[int, socket.socket]]:
        """Returns what all hear, and by what. `hello`: what process 0 itself has to say."""
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            await self._listen(hello, stack)
            threading.Thread(target=self._come, args=(hello, seconds), daemon=True).start()
            while self._missing() and not self._problem and time.monotonic() - began < seconds:
                await asyncio.sleep(0.02)
            self._problem = self._problem or self._difference(seconds)
            self._decided = True
            if not self._problem:
                stack.close()  # before an answer: others then look for jax at one of these ports
            awaited = self._processes.count if self._problem else 0
            linger = seconds if hello["leaving"] else _LINGER_SECONDS
            late = min(began + seconds, time.monotonic() + linger)
            while self._waiting or (self._answered < awaited and time.monotonic() < late):
                await asyncio.sleep(0.02)
        return self._answer(), self._connections

    async def _listen(self, hello: dict[str, Any], stack: contextlib.ExitStack) -> None:
        """At the port after the coordinator's and at its own, which jax takes afterwards."""
        port = self._processes.meeting_place[1]
        for number in (port, port - 1):
            try:
                server = await asyncio.start_server(self._hear, port=number, limit=_LONGEST)
                stack.callback(server.close)
            except OSError as error:
                remedy = "give all processes a --coordinator with another port"
                self._fail(hello, f"cannot listen at port {number}, {error.strerror}; {remedy}")

    def _come(self, hello: dict[str, Any], seconds: float) -> None:
        """Process 0 comes as the others do: where that fails, they would not find it either."""
        try:
            found = _attend(self._processes, hello, seconds)[0]["error"]
        except MeetingError as error:
            found = str(error)
        self._problem = self._problem or found

    async def _hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection; that of a stranger ends soon."""
        with contextlib.closing(writer):
            writer.write(_GREETING)
            try:
                hello = json.loads(await asyncio.wait_for(reader.readline(), _LINE_SECONDS))
                self._admit(hello)
            except (OSError, ValueError, TypeError, LookupError, RecursionError):
                return
            except asyncio.CancelledError:  # the meeting is over
                return
            self._waiting += 1
            while not (self._decided or _is_lost(reader)):
                await asyncio.sleep(0.05)
            self._waiting, self._answered = self._waiting - 1, self._answered + 1
            if _is_lost(reader):
                self._gone |= not self._problem
                self._fail(
                    hello, "was killed or stopped before the run began; start all processes again"
                )
            elif hello["index"]:
                self._connections[hello["index"]] = writer.get_extra_info("socket").dup()
            writer.write(_line(self._answer()))

    def _admit(self, hello: dict[str, Any]) -> None:
        """Notes what one says; ValueError, TypeError, LookupError: it is no process of ours."""
        index, count, host = hello["index"], hello["count"], hello["host"]
        if not (type(index) is type(count) is int and 0 <= index < count and type(host) is str):
            raise ValueError(f"process {index!r} of {count!r} on {host!r}")
        dict(hello["fingerprints"])
        if hello["leaving"]:
            self._fail(hello, f"cannot start: {hello['leaving']}")
        elif count != self._processes.count:
            own = f"process 0 as one of {self._processes.count}"
            self._fail(hello, f"was started as one of {count}, {own}: give all the same number")
        elif index in self._present:
            other = self._present[index]["host"]
            self._fail(hello, f"is there twice, on {other} too: give each its own --process_id")
        else:
            self._present[index] = hello

    def _fail(self, hello: dict[str, Any], what: str) -> None:
        self._problem = self._problem or f"process {hello['index']} on {hello['host']} {what}"

    def _answer(self) -> dict[str, Any]:
        return {"error": self._problem, "gone": self._gone}

    def _missing(self) -> str:
        absent = set(range(self._processes.count)) - self._present.keys()
        return ", ".join(map(str, sorted(absent)))

    def _difference(self, seconds: float) -> str:
        """Who is missing or not about to run the same; '' where all is well."""
        if missing := self._missing():
            return (
                f"started on {len(self._present)} of {self._processes.count} hosts: missing "
                f"{missing} after {seconds:.0f} s ({self._processes.found_in}); see their own "
                "output"
            )
        for name, wanted in self._present[0]["fingerprints"].items():
            said = {i: hello["fingerprints"].get(name) for i, hello in self._present.items()}
            others = [index for index, value in sorted(said.items()) if value != wanted]
            if others:
                where = _parts(wanted, said[others[0]])
                return (
                    f"{name} differs: process(es) {', '.join(map(str, others))} not as process 0; "
                    f"give every host the same {name}{where}"
                )
        return ""


def _is_lost(reader: asyncio.StreamReader) -> bool:
    return reader.at_eof() or reader.exception() is not None


def _parts(wanted: Any, other: Any) -> str:
    """The first parts in which a fingerprint is not process 0's."""
    if not isinstance(wanted, dict) or not isinstance(other, dict):
        return ""
    keys = [key for key in sorted(wanted | other) if wanted.get(key) != other.get(key)]
    return f" ({', '.join(f'{key}: {other.get(key)}, not {wanted.get(key)}' for key in keys[:3])})"


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
