"""The live progress line of a run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_PLAIN_SECONDS = 5.0  # without a terminal: a line at most this often


class ProgressLine:
    """One line that stays in place on a terminal; elsewhere a plain line every few seconds."""

    def __init__(self, console: Console, num_steps: int):
        self._console = console
        self._num_steps = num_steps
        self._last_plain = -_PLAIN_SECONDS
        self._bar = Progress(
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            console=console,
        )
        self._task = self._bar.add_task("", total=num_steps)

    def __enter__(self) -> ProgressLine:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def update(self, line: Mapping[str, Any]) -> None:
        """Shows a metrics line."""
        left = (self._num_steps - line["step"]) * line["step_seconds"]
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        speed = f"{line['tokens_per_second']:,.0f} tokens/s"
        text = f"loss {loss}  {speed}  ETA {_duration(left)}"
        if self._console.is_terminal:
            self._bar.update(self._task, completed=line["step"], description=text)
            return
        now, last = time.monotonic(), line["step"] == self._num_steps
        if last or now - self._last_plain >= _PLAIN_SECONDS:
            self._last_plain = now
            self._console.print(f"step {line['step']:,}/{self._num_steps:,}  {text}")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{days} d {clock}" if days else clock
