"""Google Cloud's notice that a machine is about to be taken away."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from stablelm_jax.parallel.distributed import METADATA_HOST, metadata_request

_PRODUCT = Path("/sys/class/dmi/id/product_name")
# What the metadata server is asked, and the answer that announces the end.
_NOTICES = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
_WAIT_SECONDS = 60  # the server answers when the value changes, or after this
_PAUSE_SECONDS = 1.0  # after a server that did not wait, or gave no answer


def watch(hear: Callable[[str], None]) -> None:
    """On Google's machines, calls `hear` with the name of a notice, from a thread; else nothing."""
    host = os.environ.get("GCE_METADATA_HOST")  # as Google's own libraries read it
    with contextlib.suppress(OSError):
        if host is None and "Google" in _PRODUCT.read_text():
            host = METADATA_HOST
    if host is not None:
        for what, announces in _NOTICES.items():
            arguments = host, what, announces, hear
            threading.Thread(target=_wait_for, args=arguments, daemon=True).start()


def _wait_for(host: str, what: str, announces: str, hear: Callable[[str], None]) -> None:
    first, path = True, what
    while True:
        asked_at = time.monotonic()
        with contextlib.suppress(OSError, ValueError):  # urllib's errors are among them
            request = metadata_request(path, host)
            with urllib.request.urlopen(request, timeout=2 * _WAIT_SECONDS) as answer:
                announced = answer.read().decode().strip() == announces
                etag = answer.headers.get("ETag", "0")
            path = f"{what}?wait_for_change=true&timeout_sec={_WAIT_SECONDS}&last_etag={etag}"
            # Maintenance is announced long before: a run that starts meanwhile does not leave.
            if announced and not (first and what == "maintenance-event"):
                hear(f"Google Cloud's notice {what}={announces}")
                return
            first = False
        if time.monotonic() - asked_at < _PAUSE_SECONDS:
            time.sleep(_PAUSE_SECONDS)
