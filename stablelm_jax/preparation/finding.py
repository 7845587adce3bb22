"""Which files there are under an input: a file, a folder, a pattern, or any fsspec URL of these.

Folders that are links are followed, and every folder and file is taken once, whatever leads to it.
What is found and not to be read is left out by name: hidden files, what `prepare` itself wrote.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import os
import posixpath
import re
import stat
from collections.abc import Iterator
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
    before, path = len(left_out), _local_path(written)
    if hub.PINNED.match(written):
        found, unread = _pinned_files(written)
        left_out += unread
    elif path is None:
        found = list(_remote_files(written, left_out))
    else:
        found = _LocalWalk(left_out, earlier).files(path)
    if found:
        return found
    why = "nothing there; check the path"
    if reasons := sorted({item.reason.partition(":")[0] for item in left_out[before:]}):
        why = f"nothing to read there, left out: {', '.join(reasons)}"
    elif path and os.path.isdir(path):
        why = "an empty folder"
    raise InputError(f"--input {shown(written)}: {why}")


def _local_path(written: str) -> str | None:
    """The path on this machine that an input means, also as `file://`; None for another URL."""
    if not is_url(written):
        return written
    if not written.startswith(("file://", "local://")):
        return None
    path = LocalFileSystem._strip_protocol(written)
    return path if os.path.lexists(path) else unquote(path)


class _LocalWalk:
    """The files below one input on this machine, every folder and every file once.

    Links to folders are followed when all else was seen, so a folder goes by its own name where it
    has one here.
    """

    def __init__(self, left_out: list[LeftOut], earlier: dict[tuple[int, int], str]):
        self._left_out, self._earlier = left_out, earlier
        self._found: dict[str, tuple[str, os.stat_result]] = {}  # by absolute path
        self._folders: list[str] = []  # to be listed, the next one last
        self._links: list[str] = []  # to folders
        self._listed: dict[tuple[int, int], str] = {}

    def files(self, path: str) -> list[InputFile]:
        """What `path`, a file, a folder or a pattern, stands for, in order."""
        if os.path.lexists(path) or "**" not in path:
            self._walk([path] if os.path.lexists(path) else sorted(glob.glob(path)))
            return list(self._once_each())
        # All below the folder, then what fits: `glob` would go round and round in loops of links.
        folder, before = os.path.dirname(path.partition("**")[0]) or ".", len(self._left_out)
        self._walk(sorted(glob.glob(folder)))
        fits = re.compile("|".join(map(glob_translate, (path, f"{path}/**")))).fullmatch
        self._found = {full: found for full, found in self._found.items() if fits(found[0])}
        self._left_out[before:] = filter(lambda item: fits(item.name), self._left_out[before:])
        return list(self._once_each())

    def _walk(self, starts: list[str]) -> None:
        for start in starts:
            if os.path.isfile(start) and _is_prepared(os.path.dirname(_absolute(start))):
                self._leave_out_whole(start, _OURS)
            else:
                self._take(start)
            self._list_folders()
        while self._links:
            self._folders.append(self._links.pop(0))
            self._list_folders()

    def _take(self, path: str) -> None:
        """Puts what lies at a path among the files, the folders, or what is left out."""
        try:
            status = os.stat(path)
        except OSError as error:
            if isinstance(error, FileNotFoundError) or error.errno == errno.ELOOP:
                is_link = os.path.islink(path)
                self._leave_out(path, "a link that leads nowhere" if is_link else "gone again")
            else:
                self._leave_out(
                    path, f"cannot be looked at: {error.strerror}", size=None, is_loss=True
                )
            return
        if stat.S_ISDIR(status.st_mode):
            (self._links if os.path.islink(path) else self._folders).append(path)
        elif not stat.S_ISREG(status.st_mode):
            self._leave_out(path, "a pipe, socket or device")
        elif not os.access(path, os.R_OK):
            self._leave_out(path, "no permission to read it", size=status.st_size, is_loss=True)
        else:
            self._found[_absolute(path)] = path, status

    def _list_folders(self) -> None:
        while self._folders:
            folder = self._folders.pop()
            identity, full = _identity(os.stat(folder)), _absolute(folder)
            earlier = self._listed.get(identity)
            self._listed.setdefault(identity, full)
            if earlier == full:
                continue
            if earlier:
                self._leave_out(folder, f"a link to a folder that is read already: {earlier}")
            elif _is_prepared(folder):
                self._leave_out_whole(folder, _OURS)
            else:
                self._list(folder)

    def _list(self, folder: str) -> None:
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            self._leave_out(folder, f"cannot be listed: {error.strerror}", size=None, is_loss=True)
            return
        first = len(self._folders)
        for name in names:
            path = os.path.join(folder, name)
            if _is_wanted(name):
                self._take(path)
            else:
                self._leave_out_whole(path, _HIDDEN)
        self._folders[first:] = reversed(self._folders[first:])

    def _once_each(self) -> Iterator[InputFile]:
        """Of several names of one file the one that tells its kind, and no link's if it can be."""
        chosen: dict[tuple[int, int], str] = {}
        for full, (_, status) in self._found.items():
            other = chosen.setdefault(_identity(status), full)
            if other != full and _rank(full) < _rank(other):
                chosen[_identity(status)] = full
        for full, (path, status) in self._found.items():
            known = self._earlier.get(_identity(status), chosen[_identity(status)])
            if known == full:
                self._earlier[_identity(status)] = full
                yield InputFile(full, shown(path), status.st_size, str(status.st_mtime_ns))
            else:
                self._leave_out(path, f"another name of a file that is read: {known}")

    def _leave_out(self, path: str, reason: str, **more) -> None:
        self._left_out.append(LeftOut(shown(path), shown(reason), **more))

    def _leave_out_whole(self, path: str, reason: str) -> None:
        sizes = list(_sizes(path))
        self._left_out.append(LeftOut(shown(path), reason, sum(sizes), len(sizes)))


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


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


def _rank(path: str) -> tuple[bool, bool]:
    return not os.path.splitext(path)[1], os.path.islink(path)


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
def _pinned_files(url: str) -> tuple[list[InputFile], list[LeftOut]]:
    left_out: list[LeftOut] = []

    def listed() -> list[InputFile]:
        left_out.clear()
        return list(_listed(url, left_out))

    files = hub.asked(listed, url)
    # What a set holds may be listed by anybody, and read by those alone who were let in.
    for file in filter(lambda file: file.size, files[:1]):
        hub.HubFile(file.path, file.size).read(1)
    return files, left_out


def _listed(url: str, left_out: list[LeftOut]) -> Iterator[InputFile]:
    fs, path = filesystem(url)
    fs.invalidate_cache()  # what was listed before may have changed
    first, *outer = url.split("::", 1)  # zip://a.txt::s3://bucket/b.zip
    chain = f"::{outer[0]}" if outer and is_url(first) else ""
    for name in _remote_names(fs, path, left_out):
        full, info = fs.unstrip_protocol(name) + chain, fs.info(name)
        version = info.get("blob_id") or info.get("ETag") or info.get("Last-Modified")
        file = InputFile(full, shown(full), info.get("size"), str(version or fs.ukey(name)))
        if info.get("mimetype") == "text/html" and _DATA.fullmatch(file.last_name.lower()):
            raise ValueError(f"{file.name}: the server sends a web page, perhaps to log in")
        yield file._replace(divisible=_gives_ranges(fs, name))


def _remote_files(url: str, left_out: list[LeftOut]) -> Iterator[InputFile]:
    try:
        yield from _listed(url, left_out)
    except FileNotFoundError as error:
        raise InputError(f"--input {url}: {why_not_there(error)}") from error
    except ValueError as error:
        raise InputError(f"--input {error}") from error
    except Exception as error:  # of a driver: each raises its own
        raise InputError(f"--input {url}: cannot be listed, {described(error)}") from error


def _remote_names(fs, path: str, left_out: list[LeftOut]) -> list[str]:
    """The files that a path or a pattern stands for."""
    above, matches = path, [path]
    try:
        fs.info(path)  # the characters of patterns are allowed in names and URLs
    except FileNotFoundError:
        if glob.has_magic(path):
            above = posixpath.dirname(re.split(r"[*?\[]", path)[0])
            matches = sorted(fs.glob(path)) or matches
    infos: dict[str, dict] = {}
    for found in matches:
        info = fs.info(found)  # not `isdir`: over http that fetches the file to look for links
        is_folder = info["type"] == "directory"
        infos |= sorted(fs.find(found, detail=True).items()) if is_folder else {found: info}
    folders = {posixpath.dirname(name) for name in infos if name.endswith(f"/{_FIRST_SHARD}")}
    prepared = {folder for folder in folders if f"{folder}/{MANIFEST_NAME}" in infos}
    names = []
    for name, info in infos.items():
        is_wanted = all(map(_is_wanted, name[len(above) :].strip("/").split("/")))
        is_card = name != path and bool(_CARD_NAME.search(name))
        if is_wanted and not is_card and posixpath.dirname(name) not in prepared:
            names.append(name)
        else:
            reason = _CARD if is_card else _OURS if is_wanted else _HIDDEN
            left_out.append(LeftOut(shown(fs.unstrip_protocol(name)), reason, info.get("size")))
    return names


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
