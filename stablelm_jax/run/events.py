"""What a person hears of a run while it goes on: events, and the progress line."""

from __future__ import annotations

import datetime
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

HEARING_SECONDS = 1.0  # after an error: news of another process may be on its way
_PLAIN_SECONDS = 5.0  # without a terminal: a line at most this often


class Events:
    """Prints what happens besides the steps, and keeps it in `events.jsonl`.

    A line there is a JSON object: `time`, `event`, more fields, `text`.
    """

    def __init__(self, console: Console, path: Path | None):
        """`path`: the file; None on processes that write no files."""
        self._console, self._path = console, path

    def print(self, text: str, style: str | None = None) -> None:
        """Prints a text and keeps nothing."""
        self._console.print(text, highlight=False, soft_wrap=True, style=style)

    def tell(self, event: str, text: str, *, style: str = "bold yellow", **fields: Any) -> None:
        """Prints a text in colour and keeps it."""
        if style == "bold red" and jax.process_count() > 1:
            # If the cause is another process that is gone, this one leaves meanwhile.
            time.sleep(HEARING_SECONDS)
        self.print(text, style)
        if self._path is None:  # not process 0, whose console is quiet
            print(f"process {jax.process_index()}: {text}", file=sys.stderr, flush=True)
        self.keep(event, text, **fields)

    def keep(self, event: str, text: str, **fields: Any) -> None:
        """Keeps an event without printing it. A full disk does not end the run."""
        if self._path is None:
            return
        line = {"time": time.time(), "event": event, **fields, "text": text}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, default=str) + "\n")
        except OSError as error:
            self.print(f"{self._path} cannot be written: {error}", "bold red")


class ProgressLine:
    """One line that stays in place on a terminal, while `bar` is entered; elsewhere plain lines."""

    def __init__(self, console: Console, num_steps: int):
        self._console, self._num_steps = console, num_steps
        self._printed_at = -math.inf
        self.bar = Progress(
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self.bar.add_task("", total=num_steps)

    def update(self, line: Mapping[str, Any]) -> None:
        """Shows a metrics line."""
        left = (self._num_steps - line["step"]) * line["step_seconds"]
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        speed = f"{line['tokens_per_second']:,.0f} tokens/s"
        text = f"loss {loss}  {speed}  ETA {datetime.timedelta(seconds=int(left))}"
        if self._console.is_terminal:
            self.bar.update(self._task, completed=line["step"], description=text)
            return
        now, last = time.monotonic(), line["step"] == self._num_steps
        if last or now - self._printed_at >= _PLAIN_SECONDS:
            self._printed_at = now
            self._console.print(f"step {line['step']:,}/{self._num_steps:,}  {text}")
