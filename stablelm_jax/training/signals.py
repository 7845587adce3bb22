"""A signal asks the loop to stop; the loop decides when."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

EXIT_STOPPED = 75


class StopRequest:
    """While entered, SIGINT and SIGTERM set `name` instead of ending the process."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
