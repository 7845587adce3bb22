"""The page of launch/edge in a real browser: wllama writes what llama.cpp here writes."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from small_models import KINDS, random_params, write_checkpoint

from stablelm_jax import convert
from stablelm_jax.interop.llama_cpp import LlamaCpp
from stablelm_jax.tokenizer.tokenizer import load_tokenizer
from stablelm_jax.tokenizer.train_tokenizer import train

SERVE = Path(__file__).parents[2] / "launch/edge/serve.py"
PROMPT, TOKENS = "the path of the others", 16
NO_GPU_NO_CALLS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
NO_GPU_NO_CALLS += ["--disable-background-networking", "--disable-component-update"]


def serve(*arguments):
    command = [sys.executable, str(SERVE), *map(str, arguments), "--port", "0"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_the_server_gives_the_file_the_program_and_the_page_with_both_headers(tmp_path):
    program = tmp_path / "node_modules/@wllama/wllama/esm"
    program.mkdir(parents=True)
    (program / "index.js").write_text("program")
    (program.parent / "package.json").write_text("beside it")
    (tmp_path / "m.gguf").write_text("file")
    server = serve(tmp_path / "m.gguf", tmp_path)
    try:
        address = server.stdout.readline().strip()
        found = {}
        for path in ("model.gguf", "wllama/index.js", "?threads=1", "serve.py"):
            with urllib.request.urlopen(address + path, timeout=30) as answer:
                found[path] = answer.read().decode()
                assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
                assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        for path in ("../package.json", f"/{tmp_path}/m.gguf", "", "..//", "%2e%2e/package.json"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{address}wllama/{path}", timeout=30)
    finally:
        server.terminate()
    page = SERVE.with_name("page.html").read_text(encoding="utf-8")
    assert list(found.values()) == ["file", "program", page, page]


@pytest.mark.by_hand
def test_a_file_of_ours_goes_on_in_a_browser_as_it_does_here(tmp_path):
    """npm's registry, Debian's chromium and chromium-driver."""
    if not (shutil.which("chromedriver") and shutil.which("npm")):
        pytest.skip("no chromedriver or no npm here")
    file = model_file(tmp_path)
    subprocess.run(["npm", "install", "--prefix", tmp_path, "@wllama/wllama"], check=True)
    server, driver = serve(file, tmp_path), subprocess.Popen(["chromedriver", "--port=9516"])
    try:
        address = server.stdout.readline().strip()
        text = written_in_browser(f"{address}?temperature=0&tokens={TOKENS}&threads=1", tmp_path)
    finally:
        driver.terminate()
        server.terminate()
    llama, tokenizer = LlamaCpp(file, 64, exact=False), load_tokenizer(tmp_path / "tokenizer.json")
    ids = tokenizer.encode(PROMPT)
    length = len(ids)
    for _ in range(TOKENS):
        ids.append(int(llama.logits([ids])[-1].argmax()))
    expected = tokenizer.decode(ids[length:])
    assert len(set(expected)) > 4
    assert text == expected


def model_file(folder):
    """Random weights in q4_k_m; it writes nothing but letters."""
    model = dataclasses.replace(KINDS["1.6b"], width=256, feed_forward_width=512)
    train([PROMPT] * 3, 300).save(str(folder / "tokenizer.json"))
    tokenizer, params = load_tokenizer(folder / "tokenizer.json"), random_params(model)
    for number in range(model.vocab_size):
        if number >= tokenizer.vocab_size or not tokenizer.decode([number]).isalpha():
            params["head/kernel"][:, number] = 0
    source = write_checkpoint(folder / "global_step1", model, params, folder / "tokenizer.json")
    command = ["to-gguf", str(source), str(folder / "m.gguf"), "--type=q4_k_m"]
    assert convert.main(command) == 0
    return folder / "m.gguf"


def written_in_browser(address, folder):
    """What the page writes, by WebDriver."""
    options = {"args": [*NO_GPU_NO_CALLS, f"--user-data-dir={folder / 'profile'}"]}
    wanted = {"alwaysMatch": {"goog:chromeOptions": options}}
    waited_for(lambda: call("GET", "/status")["ready"])
    session = "/session/" + call("POST", "/session", capabilities=wanted)["sessionId"]

    def run(script, *arguments):
        return call("POST", session + "/execute/sync", script=script, args=arguments)

    def state_has(text):
        state = run("return document.getElementById('state').textContent")
        assert "failed" not in state, state
        return text in state

    call("POST", session + "/url", url=address)
    waited_for(functools.partial(state_has, "ready"))
    assert run("return crossOriginIsolated") is True  # else there would be no threads
    run("document.getElementById('prompt').value = arguments[0]", PROMPT)
    run("document.getElementById('go').click()")
    waited_for(functools.partial(state_has, f"written {TOKENS}"))
    text = run("return document.getElementById('text').textContent")
    call("DELETE", session)
    return text


def call(method, path, **body):
    data = json.dumps(body).encode() if method == "POST" else None
    request = urllib.request.Request(f"http://127.0.0.1:9516{path}", data, method=method)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["value"]


def waited_for(condition, seconds=180):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except ConnectionError:
            pass
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionError):
                raise
        time.sleep(0.5)
    raise AssertionError("waited in vain")
