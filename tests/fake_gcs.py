"""Buckets on this machine: what gcsfs and tensorstore ask of the JSON API of Google Cloud Storage.

Objects are bytes in a dict, which a test may change. `fail` makes the next requests fail,
`requests` lists what was asked for. No rights, no versions, no pages in listings.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

_OBJECT = re.compile(r"(?:/download|/upload)?/storage/v1/b/([^/]+)/o(?:/([^/]+))?(?:/(.+))?")


class FakeGcs:
    """The server; `objects` is {"bucket/name": bytes}."""

    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self._faults: list[tuple[str, int]] = []
        self._uploads: dict[str, tuple[str, bytearray]] = {}
        handler = type("Handler", (_Handler,), {"store": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def environment(self) -> dict[str, str]:
        """What makes the clients of this process, or of a child, talk to this server."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # tensorstore looks for no credentials
            "GOOGLE_CLOUD_PROJECT": "fake",
            "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks a server of another kind
            "EPATH_USE_TF": "false",
        }

    def fail(self, containing: str, times: int) -> None:
        """The next `times` requests whose "METHOD path?query" contains the text get a 503."""
        self._faults.append((containing, times))

    def faults_left(self) -> int:
        """Requests that are still to fail."""
        return sum(times for _, times in self._faults)

    def is_to_fail(self, request: str) -> bool:
        with self.lock:
            self.requests.append(request)
            for place, (containing, times) in enumerate(self._faults):
                if containing in request and times:
                    self._faults[place] = (containing, times - 1)
                    return True
        return False

    def put(self, key: str, data: bytes) -> dict:
        with self.lock:
            self.objects[key] = data
            self.generations[key] = self.generations.get(key, 0) + 1
        return self.resource(key)

    def start_upload(self, key: str) -> str:
        with self.lock:
            number = str(len(self._uploads))
            self._uploads[number] = (key, bytearray())
        return number

    def add_to_upload(self, number: str, data: bytes, last: bool) -> dict | int:
        """The finished object, or how many bytes have come so far."""
        key, so_far = self._uploads[number]
        so_far += data
        return self.put(key, bytes(so_far)) if last else len(so_far)

    def resource(self, key: str) -> dict:
        """What the API says about an object."""
        bucket, name = key.split("/", 1)
        data = self.objects[key]
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "id": key,
            "size": str(len(data)),
            "generation": str(self.generations.get(key, 1)),
            "metageneration": "1",
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
            "etag": hashlib.md5(data).hexdigest(),
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
            "storageClass": "STANDARD",
        }

    def listing(self, bucket: str, prefix: str, delimiter: str) -> dict:
        items, prefixes = [], set()
        with self.lock:
            for key in sorted(self.objects):
                if not key.startswith(f"{bucket}/{prefix}"):
                    continue
                rest = key[len(f"{bucket}/{prefix}") :]
                if delimiter and delimiter in rest:
                    prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
                else:
                    items.append(self.resource(key))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """A client that hangs up, as a killed one does, is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one packet an answer: 40 ms less each
    store: FakeGcs

    def log_message(self, *_):
        pass

    def _answer(self, status: int, body: bytes | dict = b"", **headers: str) -> None:
        if isinstance(body, dict):
            body = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if self.store.is_to_fail(f"{self.command} {unquote(self.path)}"):
            return self._answer(503, {"error": {"code": 503, "message": "try again"}})
        match = _OBJECT.fullmatch(url.path)
        if match is None:
            bucket = url.path.split("/")[-1]
            return self._answer(200, {"kind": "storage#bucket", "name": bucket, "id": bucket})
        bucket, name, action = match.groups()
        if url.path.startswith("/upload"):
            return self._upload(bucket, query, body)
        if name is None:
            prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
            return self._answer(200, self.store.listing(bucket, prefix, delimiter))
        key = f"{bucket}/{unquote(name)}"
        if key not in self.store.objects:
            return self._answer(404, {"error": {"code": 404, "message": f"no {key}"}})
        return self._object(key, action, query)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _handle

    def _object(self, key: str, action: str | None, query: dict[str, str]) -> None:
        if self.command == "DELETE":
            with self.store.lock:
                self.store.objects.pop(key, None)
            self._answer(204)
        elif self.command == "POST":  # rewriteTo/b/BUCKET/o/NAME
            bucket, name = re.fullmatch(r"(?:rewriteTo|copyTo)/b/(.+)/o/(.+)", action).groups()
            resource = self.store.put(f"{bucket}/{unquote(name)}", self.store.objects[key])
            self._answer(200, {"done": True, "resource": resource})
        elif query.get("alt") == "media":
            self._media(key)
        else:
            self._answer(200, self.store.resource(key))

    def _media(self, key: str) -> None:
        data = self.store.objects[key]
        about = {"x_goog_generation": self.store.resource(key)["generation"]}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            return self._answer(200, data, **about)
        first, last = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
        if first >= len(data):
            return self._answer(416)
        about["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
        self._answer(206, data[first : last + 1], **about)

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        kind = query["uploadType"]
        if "upload_id" in query:
            span = re.fullmatch(r"bytes (?:.*)/(\d+|\*)", self.headers["Content-Range"])
            outcome = self.store.add_to_upload(query["upload_id"], body, span[1] != "*")
            if isinstance(outcome, dict):
                return self._answer(200, outcome)
            return self._answer(308, Range=f"bytes=0-{outcome - 1}")
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            _, about, rest = body.split(b"--" + boundary, 2)
            name = json.loads(about[about.index(b"{") :])["name"]
            content = rest.rsplit(b"\n--" + boundary, 1)[0]
            content = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1]
            return self._answer(200, self.store.put(f"{bucket}/{name}", content))
        if kind == "media":
            return self._answer(200, self.store.put(f"{bucket}/{query['name']}", body))
        key = f"{bucket}/{query.get('name') or json.loads(body)['name']}"
        number = self.store.start_upload(key)
        where = f"{self.store.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable"
        return self._answer(200, {}, Location=f"{where}&upload_id={number}")
