"""What happened to a run besides its steps: `events.jsonl`, and a line that nobody overlooks."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console


class Events:
    """Prints events and keeps them, one JSON object a line: `time`, `event`, more fields."""

    def __init__(self, console: Console, path: Path | None):
        """`path`: the file; None on processes that write no files."""
        self._console, self._path = console, path

    def print(self, text: str, style: str | None = None) -> None:
        """Prints a text and keeps nothing."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True, style=style)

    def tell(self, event: str, text: str, *, style: str = "bold yellow", **fields: Any) -> None:
        """Prints a text in colour and keeps it. A full disk does not end the run."""
        self.print(text, style)
        if self._path is None:  # not process 0, whose console is quiet
            print(f"process {jax.process_index()}: {text}", file=sys.stderr, flush=True)
            return
        line = {"time": time.time(), "event": event, **fields, "text": text}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, default=str) + "\n")
        except OSError as error:
            self.print(f"{self._path} cannot be written: {error}", "bold red")
