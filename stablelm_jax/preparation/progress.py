"""How far the tokenising is, shown while it lasts."""

from __future__ import annotations

import collections
import contextlib
import datetime
import pathlib
import threading
import time
from collections.abc import Iterator, Sequence

from rich.console import Console

from stablelm_jax.preparation import hub
from stablelm_jax.preparation.outputs import SCRATCH, Output, read_output
from stablelm_jax.preparation.prepare_source import Preparation

_POLL_SECONDS = 0.5
_LINE_SECONDS = 15.0  # where there is no terminal to draw a bar on


class Watch:
    """Adds up the outputs as they appear: how much is done, and how fast since this call began."""

    def __init__(self, preparations: Sequence[Preparation]):
        self._folders = [each.outputs for each in preparations]
        self._chunks = preparations[0].plan.chunks  # of all
        self._outputs: dict[tuple[pathlib.Path, int, int], Output] = {}
        self._finished: set[pathlib.Path] = set()
        # What a killed worker left unfinished is done again.
        self._started, self._before = time.monotonic(), self._look(unfinished=False)
        self.new_bytes = 0  # bytes of text tokenised since this call began

    def _look(self, *, unfinished: bool = True) -> tuple[float, int, int, int]:
        """(share of the input, bytes of text, tokens, rejected records) that are done."""
        here = {path for folder in self._folders for path in folder.iterdir()}
        for path in here - self._finished:
            if path.name.startswith(SCRATCH) and not unfinished:
                continue
            with contextlib.suppress(FileNotFoundError):  # just begun, or just renamed
                output = read_output(path)
                self._outputs[path.parent, output.chunk, output.number] = output
                if not path.name.startswith(SCRATCH):
                    self._finished.add(path)
        consumed, outputs = collections.Counter(), self._outputs.values()
        for (folder, chunk, _), output in self._outputs.items():
            size = self._chunks[chunk].size
            done = size if output.last else min(output.consumed, size)
            consumed[folder, chunk] = max(done, consumed[folder, chunk])
        whole = sum(chunk.size for chunk in self._chunks) * len(self._folders)
        return (
            consumed.total() / max(whole, 1),
            sum(sum(output.text_bytes.values()) for output in outputs),
            sum(sum(output.tokens.values()) for output in outputs),
            sum(output.rejected for output in outputs),
        )

    def line(self) -> str:
        """What is done, how fast, and how long the rest will take."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        share, text_bytes, tokens, rejected = self._look()
        new_share, self.new_bytes = share - self._before[0], text_bytes - self._before[1]
        line = f"tokenizing {share:.0%}, {self.new_bytes / 1e6 / seconds:.1f} MB/s"
        line += f", {(tokens - self._before[2]) / seconds:,.0f} tokens/s"
        if 0 < new_share and share < 1:
            left = datetime.timedelta(seconds=round(seconds * (1 - share) / new_share))
            line += f", {left} left"
        line += f", {rejected:,} rejected" if rejected else ""
        places = [output.place for output in self._outputs.values() if not output.last]
        waits = [place for place in places if place.startswith(hub.WAITING)]
        return line + (f"; {len(waits)} {waits[0]}" if waits else "")

    def show(self, console: Console, stop: threading.Event) -> None:
        """Until `stop` is set, says it in place, or by a line now and then."""
        with console.status("tokenizing") as status:
            while not stop.wait(_POLL_SECONDS if console.is_terminal else _LINE_SECONDS):
                status.update(self.line()) if console.is_terminal else console.print(self.line())
        console.print(self.line())


@contextlib.contextmanager
def progress(preparations: Sequence[Preparation], console: Console) -> Iterator[Watch]:
    """Shows how far the tokenising is, whoever does it."""
    watch, stop = Watch(preparations), threading.Event()
    thread = threading.Thread(target=watch.show, args=(console, stop), daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        stop.set()
        thread.join()
