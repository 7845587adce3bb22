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
    """Says events aloud and keeps them, one JSON object a line: `time`, `event`, more fields."""

    def __init__(self, console: Console, path: Path | None):
        """`path`: of the file; None on processes that write no files."""
        self._console, self._path = console, path

    def print(self, text: str) -> None:
        """Says it, and no more."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def tell(self, event: str, text: str, *, style: str = "bold yellow", **fields: Any) -> None:
        """Says it in colour and writes it down. A full disk does not end the run."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True, style=style)
        if self._path is None:  # not process 0, whose console is quiet
            print(f"process {jax.process_index()}: {text}", file=sys.stderr, flush=True)
            return
        line = {"time": time.time(), "event": event, **fields, "text": text}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, default=str) + "\n")
        except OSError as error:
            self._console.print(f"{self._path} cannot be written: {error}", style="bold red")
