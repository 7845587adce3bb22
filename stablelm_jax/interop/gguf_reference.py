"""llama.cpp (PyPI `xllamacpp`), which runs a GGUF file to check it.

T positions of a prompt, P of them that are compared, V vocabulary.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stablelm_jax.interop.verify import PROMPT, Mismatch, log_softmax
from stablelm_jax.tokenizer.tokenizer import Tokenizer

# llama.cpp hands its probabilities over as JSON, two seconds for 100,352 of them.
_PROBABILITIES = 1_000_000
_POSITIONS = (8, 32)  # at least, at most
_LEAST = -80.0  # nats; llama.cpp's float32 probabilities end a little below


def installed() -> bool:
    """Whether llama.cpp is."""
    return importlib.util.find_spec("xllamacpp") is not None


def reference_name() -> str:
    """Its name, for a person."""
    return f"llama.cpp (xllamacpp {importlib.metadata.version('xllamacpp')})"


def log_probabilities(
    path: Path, tokenizer: Tokenizer, ids: Sequence[int], logits_TV: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ours and llama.cpp's [P, V] in nats, at positions spread over the prompt, the last among
    them.

    Args:
      ids: the first tokens of PROMPT. logits_TV: ours of them.

    Raises:
      Mismatch: llama.cpp makes other tokens of the prompt than `tokenizer`.
    """
    count = min(len(ids), np.clip(_PROBABILITIES // logits_TV.shape[1], *_POSITIONS))
    positions = np.linspace(0, len(ids) - 1, count).astype(int)
    llama = LlamaCpp(path, len(ids))
    if llama.tokenize(PROMPT)[: len(ids)] != list(ids):
        raise Mismatch(
            f"llama.cpp makes other tokens of a text than {tokenizer.name}; what was written was "
            "removed"
        )
    ours_PV = log_softmax(logits_TV[positions].astype(np.float64))
    theirs_PV = np.stack([llama.log_probabilities(ids[: p + 1]) for p in positions])
    return np.maximum(ours_PV, _LEAST), np.maximum(theirs_PV, _LEAST)


class LlamaCpp:
    """llama.cpp's own server, in this process, on one GGUF file; keys and values in float32."""

    def __init__(self, path: Path, num_tokens: int):
        """Loads the file; `num_tokens`: the longest text.

        Raises:
          Mismatch: llama.cpp cannot.
        """
        import xllamacpp

        given = xllamacpp.CommonParams()
        given.model.path = str(path)
        given.n_ctx = num_tokens + 1
        given.n_parallel = 1
        given.n_gpu_layers = 0
        given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        given.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        given.warmup = given.fit_params = False
        given.verbosity = -1
        try:
            self._server = xllamacpp.Server(given)
        except RuntimeError as error:
            raise Mismatch(f"llama.cpp does not load {path.name}: {error}") from error
        self._vocab_size = self._call("/v1/models")["data"][0]["meta"]["n_vocab"]
        self._plain_token = self.tokenize("a")[0]

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, with no token put before or after it."""
        return self._call("/tokenize", content=text, add_special=False)["tokens"]

    def generate(self, ids: Sequence[int], count: int) -> list[int]:
        """The `count` tokens that follow, each the likeliest; an end of text does not end it."""
        return self._complete(ids, count, ignore_eos=True, return_tokens=True)["tokens"]

    def log_probabilities(self, ids: Sequence[int]) -> np.ndarray:
        """[V] in nats, of what follows; they are those before any bias."""
        # The answer lacks them where the token that was taken is a part of a character or ends the
        # text, so one that does neither is taken.
        bias = [[self._plain_token, 1e6]]
        answer = self._complete(ids, 1, n_probs=self._vocab_size, logit_bias=bias)
        (step,) = answer["completion_probabilities"]
        found_V = np.full(self._vocab_size, np.nan)
        for token in step["top_logprobs"]:
            found_V[token["id"]] = token["logprob"]
        return found_V

    def _complete(self, ids: Sequence[int], count: int, **wanted: Any) -> dict[str, Any]:
        wanted |= {"prompt": list(ids), "n_predict": count, "temperature": 0.0}
        return self._call("/completion", **wanted)

    def _call(self, what: str, **wanted: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            self._server.listening_address + what,
            data=json.dumps(wanted).encode() if wanted else None,
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)
