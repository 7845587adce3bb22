"""Serves a GGUF file and a page that runs it in the browser, by wllama:

    npm install --prefix wllama @wllama/wllama
    python launch/edge/serve.py mine.gguf wllama

Any other web server does as well, if it sends the two headers below: without them a browser gives
WebAssembly one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
from pathlib import Path

HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
}


class Handler(http.server.SimpleHTTPRequestHandler):
    """Three places: the page, the file, the program; nothing else of this machine."""

    def __init__(self, *request, model: Path, program: Path, **more):
        self.model, self.program = model, program
        super().__init__(*request, **more)

    def translate_path(self, path: str) -> str:
        path = path.partition("?")[0]
        if path == "/model.gguf":
            return str(self.model)
        if path.startswith("/wllama/"):
            found = (self.program / path.removeprefix("/wllama/")).resolve()
            # A name that no file has is answered with 404.
            inside = found.is_file() and found.is_relative_to(self.program.resolve())
            return str(found if inside else self.program / "not there")
        return str(Path(__file__).with_name("page.html"))

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a .gguf file, below 2 GB")
    parser.add_argument("wllama", type=Path, help="where npm installed @wllama/wllama")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    program = given.wllama / "node_modules/@wllama/wllama/esm"
    for path in (given.model, program / "index.js"):
        if not path.is_file():
            parser.error(f"{path} is not there")
    if given.model.stat().st_size >= 2**31:
        parser.error(f"{given.model} has 2 GB or more, which no browser loads: take fewer bits")
    handler = functools.partial(Handler, model=given.model, program=program)
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", given.port), handler)
    except OSError as error:
        parser.error(
            f"port {given.port} cannot be had ({error.strerror}): name another with --port"
        )
    with server:
        print(f"http://localhost:{server.server_port}/", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    main()
