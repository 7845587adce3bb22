"""What is found under an input: every file once, and a clear line where there is nothing."""

import http.server
import threading

import pytest

from stablelm_jax.preparation.inputs import InputError, find_files
from stablelm_jax.storage import remote


class Answers(http.server.BaseHTTPRequestHandler):
    """/CODE/... is answered with that code, a redirect with itself, and 200 with two lines."""

    def do_GET(self):
        code = int(self.path.split("/")[1])
        body = b'{"text": "one"}\n{"text": "two"}\n' if code == 200 else b""
        self.send_response(code)
        if code == 302:
            self.send_header("Location", self.path)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    """The address of a web server of this machine."""
    pytest.importorskip("aiohttp")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize(
    ("url", "kind", "compression"),
    [
        ("a.jsonl?download=true", "jsonl", None),
        ("a.jsonl.gz?X-Amz-Signature=01%2F23&name=b.txt", "jsonl", "gzip"),
        ("with%20space%2Ejsonl#part.txt", "jsonl", None),
        ("a%5B1%5D.parquet?x=[*]", "parquet", None),
        ("notes?file=a.jsonl", "text", None),
    ],
)
def test_the_kind_of_a_url_is_told_by_its_path_and_not_by_its_query(server, url, kind, compression):
    (file,) = find_files([f"{server}/200/{url}"])
    assert (file.kind, file.compression) == (kind, compression)
    assert file.path == f"{server}/200/{url}"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (401, "the server refuses with 401; give a URL that is signed"),
        (403, "the server refuses with 403"),
        (404, "nothing there; check the path"),
        (302, "from one address to the next without end"),
        (500, "the server fails with 500; try again later"),
        (503, "the server fails with 503; try again later"),
    ],
)
def test_what_a_server_answers_is_said_in_one_line(server, code, said):
    with pytest.raises(InputError, match=said) as raised:
        find_files([f"{server}/{code}/a.jsonl?x=1"])
    assert "\n" not in str(raised.value)


def test_a_server_that_is_down_or_unknown_is_told_from_a_file_that_is_missing():
    for url in ("http://127.0.0.1:1/a.jsonl", "http://nowhere.invalid/a.jsonl?download=true"):
        with pytest.raises(InputError, match="the server cannot be reached, .*check the address"):
            find_files([url])


def test_a_driver_that_is_missing_names_the_extra_that_brings_it(monkeypatch):
    def missing(url, **options):
        raise ImportError("it is missing")

    monkeypatch.setattr(remote.fsspec.core, "url_to_fs", missing)
    for url, extra in [("http://h/a", "http"), ("https://h/a", "http"), ("s3://b/a", "s3")]:
        with pytest.raises(InputError, match=rf"pip install -e '.\[{extra}\]'"):
            find_files([url])


def test_a_large_file_may_take_longer_than_the_five_minutes_of_the_driver():
    pytest.importorskip("aiohttp")
    timeout = remote.driver_options("https://h/a.jsonl")["client_kwargs"]["timeout"]
    assert timeout.total is None and timeout.sock_read
    assert remote.driver_options("s3://bucket/a.jsonl") == {}
