"""Which files there are under an input: a file, a folder, a pattern, or any fsspec URL of these.

Folders that are links are followed, and every folder and file is taken once, whatever leads to it.
What is found and not to be read is left out by name: hidden files, what `prepare` itself wrote.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import glob
import os
import posixpath
import re
import stat
from collections.abc import Iterator
from itertools import filterfalse
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from stablelm_jax.data.manifest import MANIFEST_NAME
from stablelm_jax.preparation import hub
from stablelm_jax.storage.remote import described, filesystem, is_http, is_url, why_not_there

_HIDDEN, _OURS, _CARD = "hidden", "written by prepare", "the card of its repository"
_CARD_NAME = re.compile(r"@[0-9a-f]{40}/README\.md$")  # at the top of a repository of the Hub
_FIRST_SHARD = "train-00000.bin"
_DATA = re.compile(r".*\.(txt|jsonl?|ndjson|parquet|arrow|csv|tsv|zip|tar|tgz|gz|zstd?|xz|bz2)")


class InputError(ValueError):
    """An input that is not there or cannot be taken; the message says which and what to do."""


class InputFile(NamedTuple):
    """A file to read."""

    path: str  # what is opened, an absolute path or a URL
    name: str  # the file as the user wrote it, for messages
    size: int | None  # in bytes; None where a server does not tell
    version: str  # changes when the file does
    kind: str = ""  # one of formats.FORMATS
    compression: str | None = None  # as its name says
    divisible: bool = True  # whether parts of it can be read

    @property
    def last_name(self) -> str:
        """What tells its kind: the last part of its path, of a URL without query and fragment."""
        path = unquote(urlsplit(self.path).path) if is_http(self.path) else self.path
        return posixpath.basename(path)


class LeftOut(NamedTuple):
    """A file, or a folder with all that it holds, that is found and not read."""

    name: str
    reason: str  # up to a colon, the same for all of its kind
    size: int | None = 0  # in bytes; None where nobody can tell
    files: int = 1
    is_loss: bool = False  # whether it should have been read


def shown(name: str) -> str:
    """A file name in one line of real text: bytes that are no UTF-8, and controls, are escaped."""

    def escaped(character: str) -> str:
        if "\udc80" <= character <= "\udcff":  # how Python hands over a byte that is no UTF-8
            return f"\\x{ord(character) - 0xDC00:02x}"
        return character.encode("unicode_escape").decode()

    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else escaped(c) for c in name)


def files_of(
    written: str, left_out: list[LeftOut], earlier: dict[tuple[int, int], str]
) -> list[InputFile]:
    """The files that one input stands for, in order; of which kind they are is not known yet.

    Args:
      left_out: gets what is found and not read.
      earlier: the local files of earlier inputs, device and inode and path; gets those of this one.

    Raises:
      InputError: there is nothing to read.
      OSError: the Hub refuses or fails.
    """
    path = local_path(written)
    if path is not None:
        walk = _LocalWalk()
        found, unread = list(walk.files(path, earlier)), walk.left_out
    else:
        found, unread = (_pinned if hub.PINNED.match(written) else _remote)(written)
    left_out += unread
    if found:
        return found
    why = "nothing there; check the path"
    if reasons := sorted({item.reason.partition(":")[0] for item in unread}):
        why = f"nothing to read there, left out: {', '.join(reasons)}"
    elif path and os.path.isdir(path):
        why = "an empty folder"
    raise InputError(f"--input {shown(written)}: {why}")


def local_path(written: str) -> str | None:
    """The path on this machine that is meant, also as `file://`; None for another URL."""
    if not is_url(written):
        return written
    if not written.startswith(("file://", "local://")):
        return None
    path = LocalFileSystem._strip_protocol(written)
    return path if os.path.lexists(path) else unquote(path)


class _LocalWalk:
    """The files below one input on this machine, every folder and every file once."""

    def __init__(self):
        self.left_out: list[LeftOut] = []
        self._found: dict[str, tuple[str, os.stat_result]] = {}  # by absolute path
        self._listed: dict[tuple[int, int], str] = {}

    def files(self, path: str, earlier: dict[tuple[int, int], str]) -> Iterator[InputFile]:
        """What `path`, a file, a folder or a pattern, stands for, in order; `earlier`: `files_of`.

        Of several names of one file it is the one that tells its kind, and no link's if it can be.
        """
        if os.path.lexists(path):
            self._walk([path])
        elif "**" in path:
            self._walk_and_match(path)
        else:
            self._walk(sorted(glob.glob(path)))
        names = collections.defaultdict(list)
        for full, (_, status) in self._found.items():
            names[_identity(status)].append(full)
        for full, (path, status) in self._found.items():
            identity = _identity(status)
            known = earlier.setdefault(identity, min(names[identity], key=_rank))
            if known == full:
                yield InputFile(full, shown(path), status.st_size, str(status.st_mtime_ns))
            else:
                self._leave_out(path, f"another name of a file that is read: {known}")

    def _walk_and_match(self, pattern: str) -> None:
        """All below its folder, then what fits: `glob` would go round in loops of links."""
        self._walk(sorted(glob.glob(os.path.dirname(pattern.partition("**")[0]) or ".")))
        fits = re.compile("|".join(map(glob_translate, (pattern, f"{pattern}/**")))).fullmatch
        self._found = {full: found for full, found in self._found.items() if fits(found[0])}
        self.left_out = [item for item in self.left_out if fits(item.name)]

    def _walk(self, starts: list[str]) -> None:
        """Links to folders come last, so a folder goes by its own name where it has one here."""
        links = [start for start in starts if os.path.islink(start) and os.path.isdir(start)]
        waiting = collections.deque([start for start in starts if start not in links] + links)
        while waiting:
            start = waiting.popleft()
            if not os.path.isdir(start):
                is_ours = _is_prepared(os.path.dirname(_absolute(start)))
                self._leave_out_whole(start, _OURS) if is_ours else self._take(start)
                continue
            for folder, inner, names in os.walk(start, onerror=self._cannot_be_listed):
                waiting.extend(self._list(folder, inner, names))

    def _list(self, folder: str, inner: list[str], names: list[str]) -> list[str]:
        """Takes the files of a folder, leaves in `inner` what to walk next; links to folders."""
        if not self._is_new(folder):
            inner.clear()
            return []
        for name in sorted(filterfalse(_is_wanted, names + inner)):
            self._leave_out_whole(os.path.join(folder, name), _HIDDEN)
        for name in sorted(filter(_is_wanted, names)):
            self._take(os.path.join(folder, name))
        inner[:] = sorted(filter(_is_wanted, inner))
        paths = [os.path.join(folder, name) for name in inner]
        return [path for path in paths if os.path.islink(path)]  # os.walk goes into none

    def _is_new(self, folder: str) -> bool:
        """Whether a folder is to be read; else it is left out."""
        full = _absolute(folder)
        known = self._listed.setdefault(_identity(os.stat(folder)), full)
        if known != full:
            self._leave_out(folder, f"a link to a folder that is read already: {known}")
        elif _is_prepared(folder):
            self._leave_out_whole(folder, _OURS)
        else:
            return True
        return False

    def _cannot_be_listed(self, error: OSError) -> None:
        reason = f"cannot be listed: {error.strerror}"
        self._leave_out(error.filename, reason, size=None, is_loss=True)

    def _take(self, path: str) -> None:
        """Puts what lies at a path among the files, or what is left out."""
        try:
            status = os.stat(path)
        except OSError as error:
            if isinstance(error, FileNotFoundError) or error.errno == errno.ELOOP:
                is_link = os.path.islink(path)
                self._leave_out(path, "a link that leads nowhere" if is_link else "gone again")
            else:
                reason = f"cannot be looked at: {error.strerror}"
                self._leave_out(path, reason, size=None, is_loss=True)
            return
        if not stat.S_ISREG(status.st_mode):
            self._leave_out(path, "a pipe, socket or device")
        elif not os.access(path, os.R_OK):
            self._leave_out(path, "no permission to read it", size=status.st_size, is_loss=True)
        else:
            self._found[_absolute(path)] = path, status

    def _leave_out(self, path: str, reason: str, **more) -> None:
        self.left_out.append(LeftOut(shown(path), shown(reason), **more))

    def _leave_out_whole(self, path: str, reason: str) -> None:
        sizes = list(_sizes(path))
        self._leave_out(path, reason, size=sum(sizes), files=len(sizes))


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _rank(path: str) -> tuple[bool, bool]:
    return not os.path.splitext(path)[1], os.path.islink(path)


def _absolute(path: str) -> str:
    """As `os.path.abspath`, which takes `link/..` for the folder that the link lies in."""
    if os.pardir not in path.split(os.sep):
        return os.path.abspath(path)
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def _is_prepared(folder: str) -> bool:
    """Whether `prepare` wrote a folder, or is at it."""
    inside = functools.partial(os.path.join, folder)
    if not os.path.exists(inside(_FIRST_SHARD)):
        return os.path.exists(inside(".work", "outputs"))
    return os.path.exists(inside(MANIFEST_NAME)) or os.path.exists(inside("rejected.jsonl"))


def _sizes(path: str) -> Iterator[int]:
    """The size of a file, or of every file in a folder; links are not followed."""
    paths = [path]
    if os.path.isdir(path) and not os.path.islink(path):
        paths = (os.path.join(parent, name) for parent, _, names in os.walk(path) for name in names)
    for each in paths:
        with contextlib.suppress(OSError):  # just removed
            yield os.lstat(each).st_size


def _is_wanted(name: str) -> bool:
    return not name.startswith(".") and name != "__pycache__"


@functools.cache  # for good, as a revision does not change
def _pinned(url: str) -> tuple[list[InputFile], list[LeftOut]]:
    files, left_out = hub.asked(lambda: _listed(url), url)
    # What a set holds may be listed by anybody, and read by those alone who were let in.
    for file in filter(lambda file: file.size, files[:1]):
        hub.HubFile(file.path, file.size).read(1)
    return files, left_out


def _remote(url: str) -> tuple[list[InputFile], list[LeftOut]]:
    try:
        return _listed(url)
    except FileNotFoundError as error:
        raise InputError(f"--input {url}: {why_not_there(error)}") from error
    except ValueError as error:
        raise InputError(f"--input {error}") from error
    except Exception as error:  # of a driver: each raises its own
        raise InputError(f"--input {url}: cannot be listed, {described(error)}") from error


def _listed(url: str) -> tuple[list[InputFile], list[LeftOut]]:
    """The files that a URL, or a pattern of them, stands for; and those that are left out."""
    fs, path = filesystem(url)
    fs.invalidate_cache()  # what was listed before may have changed
    first, *outer = url.split("::", 1)  # zip://a.txt::s3://bucket/b.zip
    chain = f"::{outer[0]}" if outer and is_url(first) else ""
    above, sizes = _below(fs, path)
    folders = {posixpath.dirname(name) for name in sizes if name.endswith(f"/{_FIRST_SHARD}")}
    prepared = {folder for folder in folders if f"{folder}/{MANIFEST_NAME}" in sizes}
    files, left_out = [], []
    for name, size in sizes.items():
        reason = _OURS if posixpath.dirname(name) in prepared else ""
        if name != path and _CARD_NAME.search(name):
            reason = _CARD
        elif not all(map(_is_wanted, name[len(above) :].strip("/").split("/"))):
            reason = _HIDDEN
        if reason:
            left_out.append(LeftOut(shown(fs.unstrip_protocol(name)), reason, size))
        else:
            files.append(_remote_file(fs, name, fs.unstrip_protocol(name) + chain))
    return files, left_out


def _remote_file(fs, name: str, url: str) -> InputFile:
    info = fs.info(name)
    version = info.get("blob_id") or info.get("ETag") or info.get("Last-Modified")
    file = InputFile(url, shown(url), info.get("size"), str(version or fs.ukey(name)))
    if info.get("mimetype") == "text/html" and _DATA.fullmatch(file.last_name.lower()):
        raise ValueError(f"{file.name}: the server sends a web page, perhaps to log in")
    return file._replace(divisible=_gives_ranges(fs, name))


def _below(fs, path: str) -> tuple[str, dict[str, int | None]]:
    """The folder that a path or a pattern begins at; and the files that it stands for, by size."""
    above, matches = path, [path]
    try:
        fs.info(path)  # the characters of patterns are allowed in names and URLs
    except FileNotFoundError:
        if glob.has_magic(path):
            above = posixpath.dirname(re.split(r"[*?\[]", path)[0])
            matches = sorted(fs.glob(path)) or matches
    infos: dict[str, dict] = {}
    for match in matches:
        info = fs.info(match)  # not `isdir`: over http that fetches the file to look for links
        is_folder = info["type"] == "directory"
        infos |= sorted(fs.find(match, detail=True).items()) if is_folder else {match: info}
    return above, {name: info.get("size") for name, info in infos.items()}


def _gives_ranges(fs, path: str) -> bool:
    """Whether parts of a file can be read: every store can do that, but not every http server."""
    if not is_http(path):
        return True
    try:
        with fs.open(path, "rb", block_size=1) as file:
            file.seek(1)
            file.read(1)
    except ValueError:
        return False
    return True
