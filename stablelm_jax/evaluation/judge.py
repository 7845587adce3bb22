"""A judge behind an address: any server that speaks OpenAI's chat completions."""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from typing import Any

from stablelm_jax.storage.remote import described, retry

_PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP's codes: another try may succeed


class Refusal(ValueError):
    """The server refuses what it was asked, and will again."""


class Judge:
    """Grades texts from 1 to 10. Never let a model grade itself: it prefers its own words.

    `model` is its name, as the server knows it.
    """

    def __init__(self, url: str, model: str | None = None, timeout: float = 300.0):
        """`url`: before /chat/completions; without a path, /v1. `timeout`: seconds of silence.

        The model is by default the only one that the server lists. Errors: OSError, ValueError
        where it cannot be reached, refuses, or lists several.
        """
        self._url, self._timeout = url.rstrip("/").removesuffix("/chat/completions"), timeout
        if not re.match("https?://[^/]", url):
            raise ValueError(f"--judge {url}: give an address that begins with http:// or https://")
        self._url += "" if re.match("https?://[^/]+/", self._url) else "/v1"
        # As FastChat asks. Some models refuse the one or the other, and say so.
        self._options = {"temperature": 0, "max_tokens": 2048}
        self.model = model or self._only_model()

    def _only_model(self) -> str:
        try:
            names = [one["id"] for one in self._call("/models")["data"]]
        except (Refusal, KeyError, TypeError):
            names = []
        if len(names) > 1:
            listed = ", ".join(names[:20])
            raise ValueError(f"{self._url} lists the models {listed}: choose one by --judge-model")
        return names[0] if names else "default"  # a server of one model needs no name

    def grade(self, system: str, prompt: str) -> tuple[float, str]:
        """The grade, -1 where the answer holds none, and the answer; errors as `__init__`."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        body = {"model": self.model, "messages": messages, **self._options}
        try:
            reply = self._call("/chat/completions", body)
            text = reply["choices"][0]["message"]["content"] or ""
            grade = grade_in(text)
        except Refusal as error:
            if refused := [name for name in self._options if name in str(error)]:
                del self._options[refused[0]]
                return self.grade(system, prompt)
            raise
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{self._url}: no answer in the reply {str(reply)[:200]}") from None
        return grade, text

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        url, headers = self._url + path, {"Content-Type": "application/json"}
        headers["User-Agent"] = "stablelm_jax"  # some servers refuse that of urllib
        if key := os.environ.get("OPENAI_API_KEY", "").strip():  # a file's line end is no part
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()

        def once() -> Any:
            try:
                request = urllib.request.Request(url, data, headers)
                with urllib.request.urlopen(request, timeout=self._timeout) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                if error.code in _PASSING:
                    raise
                remedy = "is --judge the address before /chat/completions, and --judge-model right?"
                if error.code in (401, 403):
                    remedy = "set OPENAI_API_KEY to a key that it takes."
                said = " ".join(error.read(500).decode(errors="replace").split())
                refusal = f"the judge {url} refuses with {error.code}: {remedy} It says: {said}"
                raise Refusal(refusal) from None
            except ValueError:
                what = "is it the address of an OpenAI-compatible server?"
                raise ValueError(f"{url} replies what is no JSON: {what}") from None

        try:
            return retry(once)
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(
                f"the judge {url} does not answer ({described(error)}; 5 tries): is the server "
                "running, and the address right? The same command goes on where it was"
            ) from error


def grade_in(text: str) -> float:
    """The first [[grade]] of a judge's answer, else the first [grade], as FastChat reads it.

    -1 where there is none, or one that is not from 1 to 10.
    """
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*)\]", text)
    return float(found[1]) if found and 1 <= float(found[1]) <= 10 else -1
