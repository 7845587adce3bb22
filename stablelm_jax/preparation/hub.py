"""Inputs on the Hugging Face Hub: `hf://datasets/OWNER/NAME@REVISION/PATH`.

huggingface_hub lists and authenticates. Files are read by a class of ours: those of its filesystem
ask for the listing of their folder again in every worker, give up at the second broken connection,
and take a file that comes short for whole.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping

from fsspec.spec import AbstractBufferedFile
from huggingface_hub import HfApi, HfUri, constants, get_token, hf_hub_url, parse_hf_uri
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import (
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
    logging,
    parse_ratelimit_headers,
)

from stablelm_jax.storage.remote import Result, described, retry

# A path at a revision that cannot change, and its repository.
PINNED = re.compile(r"hf://([^@]+)@[0-9a-f]{40}(?=/|$)")
WAITING = "waiting until"  # begins what is told of a long wait

_SILENCE = 60.0  # seconds without a byte, after which a connection is given up
_SKIPPED = 4 << 20  # bytes that are read and dropped rather than asked for anew
_LONG = 5.0  # seconds

logging.set_verbosity_error()  # what it warns of is waited for, and told by `asked`


def pinned(url: str, revisions: dict[str, str]) -> str:
    """The same input at a revision of 40 characters; any that is in no repository as it is.

    Args:
      url: as the user wrote it: `hf://datasets/OWNER/NAME/PATH`, with a revision or without.
      revisions: what is known, {"datasets/OWNER/NAME@main": 40 characters}; gets what is not.

    Raises ValueError for what is no address of the Hub, and the errors of `asked`.
    """
    if not url.startswith("hf://") or url.startswith("hf://buckets/"):
        return url
    uri, repository = _parsed(url)
    name = f"{repository}@{uri.revision}" if uri.revision else repository
    if PINNED.match(f"hf://{name}"):
        revisions[name] = uri.revision
    if name not in revisions:
        which = {"repo_type": uri.type, "revision": uri.revision, "timeout": _SILENCE}
        revisions[name] = asked(lambda: HfApi().repo_info(uri.id, **which).sha, f"hf://{name}")
    return f"hf://{repository}@{revisions[name]}/{uri.path_in_repo}".rstrip("/")


def _parsed(url: str) -> tuple[HfUri, str]:
    uri = parse_hf_uri(url)
    return uri, constants.REPO_TYPES_URL_PREFIXES.get(uri.type, "") + uri.id


def pinned_names(revisions: Mapping[str, str]) -> str:
    """The repositories at these revisions, as an input names them."""
    return ", ".join(f"hf://{name.partition('@')[0]}@{at}" for name, at in revisions.items())


def tell(text: str) -> None:
    """Says that there is a long wait; workers put a function of theirs in its place."""
    print(text, file=sys.stderr, flush=True)


def asked(action: Callable[[], Result], url: str) -> Result:
    """`action()`, which asks the Hub, again where it asks to wait, or while the error may pass.

    Raises, in one line that says what to do:
      PermissionError: the Hub refuses, or must not be asked.
      FileNotFoundError: there is no such thing.
      ConnectionError: the Hub fails, or cannot be reached.
    """

    def attempt() -> Result:
        waited = 0.0
        while True:
            try:
                return action()
            except Exception as error:  # versions of huggingface_hub have others of the network
                if isinstance(error, ValueError | TypeError):
                    raise
                cause = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
                answer = getattr(cause, "response", None)
                seconds = _seconds_asked_for(answer)
                if seconds is None:
                    raise _told(error, answer, url) from error
            waited += seconds
            if waited > _LONG:
                until = time.strftime("%H:%M:%S", time.localtime(time.time() + seconds))
                tell(f"{WAITING} {until}, as the Hub asks: too many requests, {url}")
            time.sleep(seconds)

    return retry(attempt)


def _seconds_asked_for(answer) -> float | None:
    """How long an answer of the Hub asks to wait; None where it does not."""
    if answer is None or answer.status_code not in (429, 503):
        return None
    limit, after = parse_ratelimit_headers(answer.headers), answer.headers.get("Retry-After", "")
    if limit and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0  # the header's are rounded
    return int(after) + 1.0 if after.isdigit() else None


def _told(error: Exception, answer, url: str) -> OSError:
    """An error, and the answer of the Hub that it is about or None, as `asked` raises it."""
    status = 0 if answer is None else answer.status_code
    code = "" if answer is None else answer.headers.get("X-Error-Code", "")
    remedy = f"ask for access at https://huggingface.co/{_parsed(url)[1]}, and set HF_TOKEN to a"
    remedy += " token of the account that has it" if get_token() else " token; none is set"
    if isinstance(error, OfflineModeIsEnabled):
        return PermissionError(f"{url}: HF_HUB_OFFLINE is set, so the Hub is not asked; unset it")
    if status in (401, 403):
        hidden = ", or has no such repository" if code == "RepoNotFound" else ""
        return PermissionError(f"{url}: the Hub refuses with {status}{hidden}; {remedy}")
    if status in range(400, 500) and status not in (408, 416, 429):
        remedy = f"; or, if it is private, {remedy}" if code == "RepoNotFound" else ""
        problem = f"nothing there ({code or status}); check the spelling{remedy}"
        return FileNotFoundError(f"{url}: {problem}")
    if status == 0 and isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{url}: nothing there; check the spelling")
    problem = f"fails with {status}" if status else f"does not give it, {described(error)}"
    return ConnectionError(f"{url}: the Hub {problem}; try again later")


class HubFile(AbstractBufferedFile):
    """A file at a pinned path, to be read; reading it raises as `asked` does.

    Each connection is one of the requests that the Hub counts (5,000 in five minutes for most
    accounts), however many bytes it brings. So one serves until somebody seeks elsewhere.
    """

    def __init__(self, path: str, size: int):
        """`size`: in bytes, as listed."""
        uri = parse_hf_uri(path)
        which = {"repo_type": uri.type, "revision": uri.revision}
        self._url = hf_hub_url(uri.id, uri.path_in_repo, **which)
        self._connection = contextlib.ExitStack()
        self._blocks: Iterator[bytes] | None = None  # what the connection brings
        self._block, self._start = b"", 0  # the last of them, and where in the file it begins
        super().__init__(None, path, size=size, block_size=1 << 16)

    def _fetch_range(self, start: int, end: int) -> bytes:
        data = bytearray()
        while (at := start + len(data)) < end:
            data += asked(functools.partial(self._next, at), self.path)[: end - at]
        return bytes(data)

    def _next(self, at: int) -> bytes:
        """Some of the bytes that begin at `at`, at least one."""
        try:
            reached = self._start + len(self._block)
            if self._blocks is None or not self._start <= at <= reached + _SKIPPED:
                self._connect(at)
            while self._start + len(self._block) <= at:
                self._start += len(self._block)
                self._block = next(self._blocks, b"")
                if not self._block:
                    raise ConnectionError(f"cut short after {self._start} of {self.size} bytes")
        except BaseException:
            self._connection.close()  # the next try asks for what has not come yet
            self._blocks = None
            raise
        return self._block[at - self._start :]

    def _connect(self, at: int) -> None:
        self._connection.close()
        # Compressed on its way, it would have other bytes than are counted here.
        headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={at}-"}
        timeout = max(_SILENCE, constants.HF_HUB_DOWNLOAD_TIMEOUT)
        options = {"headers": headers, "timeout": timeout, "max_retries": 0}
        answer = self._connection.enter_context(http_stream_backoff("GET", self._url, **options))
        hf_raise_for_status(answer)
        part = re.match(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        start, total = part.groups() if part else (0, answer.headers.get("Content-Length"))
        if total is not None and int(total) != self.size:
            raise ConnectionError(f"sends {total} bytes for a file that it lists with {self.size}")
        self._blocks, self._block, self._start = answer.iter_raw(), b"", int(start)

    def close(self) -> None:
        self._connection.close()
        super().close()
