"""A trace of some steps, and a table of what took the time in them."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from stablelm_jax.run.console import make_console

_SHOWN = 25
# These contain other operations, whose time would count twice.
_OUTER = ("while", "call", "conditional")


class Profiler:
    """Traces the steps [first, last) of a run into `folder`; does nothing for no steps.

    `folder` gets jax's trace (open it with TensorBoard or xprof) and `top_operations.txt`.
    """

    def __init__(self, steps: range, folder: Path, console: Console):
        self._steps, self._folder, self._console = steps, folder, console
        self._running = False

    def before(self, step: int) -> None:
        """Called before the update that makes `step` into step + 1."""
        if step in self._steps and not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, state: Any) -> None:
        """Called with the step reached and its state; the last of the steps ends the trace."""
        if self._running and step >= self._steps.stop:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends a trace that is running, and shows what it found."""
        if not self._running:
            return
        jax.profiler.stop_trace()
        self._running = False
        if self._console.quiet:  # another process speaks for all
            return
        newest = max(self._folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        table = _table(top_operations(newest), len(self._steps))
        self._console.print(table)
        with open(self._folder / "top_operations.txt", "w", encoding="utf-8") as file:
            make_console(file=file, width=120).print(table)
        self._console.print(f"trace: {newest}", soft_wrap=True)


def top_operations(trace: Path) -> list[tuple[str, float, int]]:
    """(operation, seconds, times) of the devices in an .xplane.pb, the longest first.

    The names are those of the compiled program, threads and devices added up.
    """
    seconds: collections.Counter[str] = collections.Counter()
    times: collections.Counter[str] = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                # TPUs keep operations on a line of their own, the others mark each of them.
                found = line.name == "XLA Ops" or any(key == "hlo_op" for key, _ in event.stats)
                if found and not event.name.startswith(_OUTER):
                    seconds[event.name] += event.duration_ns / 1e9
                    times[event.name] += 1
    return [(name, spent, times[name]) for name, spent in seconds.most_common()]


def _table(rows: list[tuple[str, float, int]], steps: int) -> Table:
    total = sum(seconds for _, seconds, _ in rows) or 1.0
    table = Table(title=f"what took the time in {steps} steps", title_justify="left")
    table.add_column("operation", no_wrap=True)
    for column in ("seconds", "share", "times"):
        table.add_column(column, justify="right")
    for name, seconds, times in rows[:_SHOWN]:
        table.add_row(name[:60], f"{seconds:.4f}", f"{seconds / total:.1%}", f"{times:,}")
    if rest := sum(seconds for _, seconds, _ in rows[_SHOWN:]):
        table.add_row(f"{len(rows) - _SHOWN} others", f"{rest:.4f}", f"{rest / total:.1%}", "")
    return table
