"""A Hugging Face Hub on this machine: what huggingface_hub asks of its API and of its files.

Repositories have commits and branches. Listings come in pages, files by a redirect to a second
server, which stands for the CDN. `fail` and `cut` make the next requests fail; `requests` and
`cdn_requests` list what was asked for.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

_API = re.compile(
    r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+))?(.*)"
)
_FILE = re.compile(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class FakeHub:
    """The servers.

    Attributes:
      page: entries of a listing that come in one answer.
      tokens: {token: repositories that it may see, of those in `gated` and `private`}.
      sent: {path in its repository: bytes that the CDN sends in place of the right ones}.
    """

    def __init__(self):
        self.page = 1000
        self.tokens: dict[str, set[str]] = {}
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.sent: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.cdn_requests: list[str] = []
        self.cdn_headers: list[dict[str, str]] = []
        self.lock = threading.RLock()
        self._commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self._branches: dict[str, dict[str, str]] = {}
        self._faults: list[list] = []
        self._cuts: list[list] = []
        self._servers = [
            _Server(("127.0.0.1", 0), type("Handler", (handler,), {"hub": self}))
            for handler in (_HubHandler, _CdnHandler)
        ]
        self.url, self.cdn = (f"http://127.0.0.1:{each.server_port}" for each in self._servers)
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def environment(self) -> dict[str, str]:
        """What makes the clients of a child process talk to this server."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN_PATH": "/nonexistent"}

    def commit(self, repository: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Makes `files` what `datasets/OWNER/NAME` holds at the head of a branch; the revision."""
        about = [self.url, repository, branch, sorted((name, _sha1(files[name])) for name in files)]
        sha = hashlib.sha1(repr(about).encode()).hexdigest()
        self._commits.setdefault(repository, {})[sha] = dict(files)
        self._branches.setdefault(repository, {})[branch] = sha
        return sha

    def fail(self, containing: str, times: int, status: int = 503, **headers: str) -> None:
        """The next `times` requests to either server that contain the text get this status."""
        self._faults.append([containing, times, status, headers])

    def cut(self, containing: str, after: int, times: int) -> None:
        """The next `times` answers of the CDN for such a request end after so many bytes."""
        self._cuts.append([containing, times, after])

    def fault(self, request: str) -> tuple[int, dict[str, str]] | None:
        """How a request is to fail, if it is."""
        found = self._next_of(self._faults, request)
        return found and tuple(found)

    def cut_of(self, request: str) -> int | None:
        """After how many bytes an answer is to end, if it is."""
        found = self._next_of(self._cuts, request)
        return found and found[0]

    def _next_of(self, faults: list[list], request: str) -> list | None:
        with self.lock:
            for fault in faults:
                if fault[0] in request and fault[1]:
                    fault[1] -= 1
                    return fault[2:]
        return None

    def resolved(self, repository: str, revision: str) -> str | None:
        """The commit that a branch, a whole or the beginning of a commit's name stands for."""
        if revision in self._branches[repository]:
            return self._branches[repository][revision]
        names = [sha for sha in self._commits[repository] if sha.startswith(revision)]
        return names[0] if len(names) == 1 and len(revision) >= 7 else None

    def files(self, repository: str, commit: str) -> dict[str, bytes]:
        return self._commits[repository][commit]

    def knows(self, repository: str) -> bool:
        return repository in self._commits

    def count(self, containing: str) -> int:
        """How many requests to the Hub, not to its CDN, contained a text."""
        return sum(containing in request for request in self.requests)

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """A client that hangs up, as one that seeks does, is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    hub: FakeHub

    def log_message(self, *_):
        pass

    def _answer(self, status: int, body: bytes | dict | list = b"", **headers: str) -> None:
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str, message: str) -> None:
        self._answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def _send(self, data: bytes, request: str, **headers: str) -> None:
        """A file, or a range of it; cut off where a test asked for that."""
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(span[1]), int(span[2] or len(data))) if span else (0, len(data))
        if span and first >= len(data):
            return self._answer(416, Content_Range=f"bytes */{len(data)}")
        body = data[first : last + 1]
        self.send_response(206 if span else 200)
        if span:
            headers["Content_Range"] = f"bytes {first}-{first + len(body) - 1}/{len(data)}"
        headers["Content_Length"] = str(len(body))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        cut = self.hub.cut_of(request)
        self.wfile.write(body[:cut])
        self.close_connection = cut is not None


class _HubHandler(_Handler):
    def _handle(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = f"{self.command} {unquote(self.path)}"
        with self.hub.lock:
            self.hub.requests.append(request)
        if fault := self.hub.fault(request):
            return self._answer(fault[0], {"error": "a fault"}, **fault[1])
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if match := _FILE.fullmatch(url.path):
            return self._file(*map(unquote, match.groups()), request)
        if not (match := _API.fullmatch(url.path)):  # not every question is about a repository
            return self._answer(404)
        kind, name, action, revision, rest = match.groups()
        repository = name if kind == "models" else f"{kind}/{name}"
        commit = self._commit(repository, unquote(revision or "main"))
        if commit and action == "tree":
            self._tree(repository, commit, unquote(rest).strip("/"), query)
        elif commit:
            about = {"gated": "auto" if repository in self.hub.gated else False}
            self._answer(200, {"id": name, "sha": commit, "private": False, **about})

    do_GET = do_HEAD = do_POST = _handle

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _commit(self, repository: str, revision: str) -> str | None:
        """The commit that is asked for; None where the answer is given: there is none."""
        hub, token = self.hub, self._token()
        if token and token not in hub.tokens:
            self._answer(401, X_Error_Message="Invalid credentials in Authorization header")
            return None
        may_see = repository not in hub.private or repository in hub.tokens.get(token, ())
        if not hub.knows(repository) or not may_see:
            # Who says no name is not told which names there are.
            self._error(404 if token else 401, "RepoNotFound", "Repository not found")
            return None
        commit = hub.resolved(repository, revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _tree(self, repository: str, commit: str, folder: str, query: dict[str, str]) -> None:
        prefix = f"{folder}/" if folder else ""
        files = self.hub.files(repository, commit)
        entries: dict[str, dict] = {}
        for path in sorted(files):
            if not path.startswith(prefix):
                continue
            steps = path[len(prefix) :].split("/")
            for depth in range(1, len(steps)):
                above = prefix + "/".join(steps[:depth])
                entries[above] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": above}
            data = files[path]
            entries[path] = {
                "type": "file", "oid": _sha1(data), "size": len(data), "path": path,
                "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data),
                        "pointerSize": 134},
            }  # fmt: skip
        if query.get("recursive", "").lower() != "true":
            entries = {
                path: each for path, each in entries.items() if "/" not in path[len(prefix) :]
            }
        if not entries:
            return self._error(404, "EntryNotFound", f"{folder} does not exist")
        start = int(query.get("cursor", "0"))
        page = list(entries.values())[start : start + self.hub.page]
        headers = {}
        if start + self.hub.page < len(entries):
            more = f"{self.hub.url}{urlsplit(self.path).path}?recursive={query.get('recursive')}"
            headers["Link"] = f'<{more}&cursor={start + self.hub.page}>; rel="next"'
        self._answer(200, page, **headers)

    def _file(self, repository: str, revision: str, path: str, request: str) -> None:
        commit = self._commit(repository, revision)
        if commit is None:
            return
        if repository in self.hub.gated and repository not in self.hub.tokens.get(
            self._token(), ()
        ):
            message = f"Access to dataset {repository} is restricted"
            return self._error(403 if self._token() else 401, "GatedRepo", message)
        data = self.hub.files(repository, commit).get(path)
        if data is None:
            return self._error(404, "EntryNotFound", "Entry not found")
        about = {"ETag": f'"{_sha1(data)}"', "X_Repo_Commit": commit}
        if len(data) < 100:  # those of git itself come from here
            return self._send(data, request, **about)
        about |= {"X_Linked_Size": str(len(data)), "X_Linked_ETag": f'"{_sha1(data)}"'}
        where = f"{self.hub.cdn}/{repository}/{commit}/{quote(path)}?Signature=secret"
        self._answer(302, Location=where, **about)


class _CdnHandler(_Handler):
    def _handle(self) -> None:
        span = self.headers.get("Range", "")
        request = f"{self.command} {unquote(urlsplit(self.path).path)} {span}"
        with self.hub.lock:
            self.hub.cdn_requests.append(request)
            self.hub.cdn_headers.append({k.lower(): v for k, v in self.headers.items()})
        if fault := self.hub.fault(request):
            return self._answer(fault[0], {"error": "a fault"}, **fault[1])
        repository, commit, path = re.fullmatch(
            r"/(.+)/([0-9a-f]{40})/(.+)", unquote(urlsplit(self.path).path)
        ).groups()
        data = self.hub.sent.get(path, self.hub.files(repository, commit)[path])
        self._send(data, request, ETag=f'"{_sha1(data)}"')

    do_GET = _handle
