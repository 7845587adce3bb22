"""What a person is shown goes through here, and what could not be shown is noted here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_lost: dict[str, str] = {}  # what could not be shown: kind -> text
_listeners: list[Callable[[str], None]] = []


def make_console(*, file_width: int | None = None, **options: Any) -> Console:
    """rich's console, to which square brackets and `:names:` are text: names of files hold them.

    `file_width`: columns where stdout is no terminal; by default rich's 80. `options`: rich's.
    """
    from rich.console import Console

    width = None if sys.stdout.isatty() else file_width
    return Console(**{"markup": False, "emoji": False, "width": width, **options})


def tell_losses(tell: Callable[[str], None]) -> None:
    """`tell(text)` is called once for each kind of output that could not be shown, now or later."""
    _listeners[:] = [tell]
    for text in list(_lost.values()):
        tell(text)


def note_loss(kind: str, text: str) -> None:
    """Notes a kind of output that cannot be shown, the first time that it happens."""
    if kind not in _lost:
        _lost[kind] = text
        for tell in _listeners:
            tell(text)
