"""Google Cloud's notice that a machine is about to be taken away."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

_HOST = "metadata.google.internal"
_PRODUCT = Path("/sys/class/dmi/id/product_name")
# Of the metadata server: what is asked, and the answer that announces the end.
_NOTICES = {
    "preempted": "TRUE",
    "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE",
}
_WAIT_SECONDS = 60  # the server answers when the value changes, or after this
_PAUSE_SECONDS = 5.0  # after an answer that tells nothing, or none


def metadata_host(environment: Mapping[str, str] = os.environ) -> str | None:
    """HOST[:PORT] of the metadata server; None on a machine that is not Google's."""
    if "GCE_METADATA_HOST" in environment:  # as Google's own libraries read it
        return environment["GCE_METADATA_HOST"]
    with contextlib.suppress(OSError):
        if "Google" in _PRODUCT.read_text():
            return _HOST
    return None


def watch(hear: Callable[[str], None]) -> None:
    """On Google's machines, calls `hear` with the name of a notice, from a thread; else nothing."""
    host = metadata_host()
    if host is None:
        return
    for what, announces in _NOTICES.items():
        arguments = host, what, announces, hear
        threading.Thread(target=_wait_for, args=arguments, name=what, daemon=True).start()


def _wait_for(host: str, what: str, announces: str, hear: Callable[[str], None]) -> None:
    url = f"http://{host}/computeMetadata/v1/instance/{what}"
    later = f"{url}?wait_for_change=true&timeout_sec={_WAIT_SECONDS}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    while True:
        with contextlib.suppress(OSError, ValueError):  # urllib's errors are among them
            with urllib.request.urlopen(request, timeout=2 * _WAIT_SECONDS) as answer:
                if answer.read().decode().strip() == announces:
                    hear(f"Google Cloud's notice {what}={announces}")
                    return
                request = urllib.request.Request(later, headers={"Metadata-Flavor": "Google"})
                continue
        time.sleep(_PAUSE_SECONDS)
