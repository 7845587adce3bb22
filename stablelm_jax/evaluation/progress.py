"""How far an evaluation is, and how it is left before its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Left(Exception):
    """The evaluation was left before its end, as somebody asked."""


class Progress(Protocol):
    """What is told of an evaluation; every process tells alike."""

    def begin(self, what: str, count: int) -> None:
        """`count` requests are about to be answered."""

    def advance(self, count: int) -> None:
        """So many more were answered; 0: something moved.

        Raises:
          Left: to end the evaluation.
        """


class Silent:
    """Shows nothing."""

    def begin(self, what: str, count: int) -> None:
        pass

    def advance(self, count: int) -> None:
        pass


class Asking:
    """Shows nothing, and asks each time whether to leave."""

    def __init__(self, leave: Callable[[], bool]):
        self._leave = leave

    def begin(self, what: str, count: int) -> None:
        self.advance(0)

    def advance(self, count: int) -> None:
        if self._leave():
            raise Left


class Bar:
    """A bar on a console, while entered."""

    def __init__(self, console: Any):
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        self._bar, self._task = Progress(*columns, console=console), None

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def begin(self, what: str, count: int) -> None:
        self._task = self._bar.add_task(what, total=count)

    def advance(self, count: int) -> None:
        if self._task is not None:
            self._bar.advance(self._task, count)
