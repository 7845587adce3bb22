"""llama.cpp (PyPI `cyllama`), which runs GGUF files, in this process.

    python -m stablelm_jax.interop.llama_cpp FILE.gguf  # speed and memory, as JSON

N tokens of all texts of a call, V vocabulary. No jax here: it would be in the memory measured.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from stablelm_jax.tokenizer.tokenizer import Tokenizer

INSTALL = "pip install 'stablelm_jax[edge]'"
_MOST_TEXTS = 256  # of one call: llama.cpp's LLAMA_MAX_SEQ
_F32, _NO_FLASH = 0, 0
PROMPT, WRITTEN = 448, 64  # tokens that are timed, of every program and whatever the context


class LoadError(ValueError):
    """llama.cpp cannot load a file."""


def name() -> str:
    """What it is called, for a person."""
    return f"llama.cpp (cyllama {importlib.metadata.version('cyllama')})"


class LlamaCpp:
    """One GGUF file on this machine's processor.

    Attributes:
      vocab_size: rows of its vocabulary.
      bits_per_weight: of its tensors, norms and biases among them.
    """

    def __init__(
        self, path: str | Path, num_tokens: int, *, exact: bool = True, threads: int | None = None
    ):
        """Loads the file.

        Args:
          num_tokens: of all texts of a call, at most.
          exact: keys and values in float32 and plain attention; else float16 and flash attention,
            as llama.cpp's programs have it.
          threads: default: the processors that this process may use.

        Raises:
          ImportError: llama.cpp is not installed. LoadError: it cannot load the file.
        """
        try:
            from cyllama.llama import llama_cpp as library
        except ImportError as error:
            raise ImportError(f"GGUF files need llama.cpp ({error}): {INSTALL}") from error
        self._library, self.path, said = library, Path(path), []
        # Levels from 3 on are warnings and errors.
        library.set_log_callback(lambda level, text: said.append(text.strip()) if level > 2 else 0)
        try:
            self._model, self._context = _load(library, path, num_tokens, exact, threads)
        except (RuntimeError, ValueError, FileNotFoundError) as error:
            why = "; ".join(text for text in said if text) or str(error)
            raise LoadError(f"llama.cpp does not load {self.path.name}: {why}") from error
        finally:
            library.disable_logging()
        self._vocab = self._model.get_vocab()
        self.vocab_size = self._vocab.n_vocab
        self.bits_per_weight = 8 * self._model.size / self._model.n_params

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, with no token put before or after it; spelt special tokens are these."""
        return list(self._vocab.tokenize(text, False, True))

    def check_tokens(self, tokenizer: Tokenizer) -> None:
        """ValueError where the file makes other tokens of a text than `tokenizer`."""
        from stablelm_jax.interop.verify import PROMPT

        if self.tokenize(PROMPT) != tokenizer.encode(PROMPT):
            raise ValueError(
                f"llama.cpp makes other tokens of a text with {self.path.name} than "
                f"{tokenizer.name}: the file has another vocabulary"
            )

    def logits(self, texts: Sequence[Sequence[int]], last: int = 1 << 31) -> np.ndarray:
        """[N, V] float32, after each token of texts that do not see one another, in their order,
        or after the `last` ones of each alone."""
        found = []
        for start in range(0, len(texts), _MOST_TEXTS):
            self._context.kv_cache_clear(True)
            part = enumerate(texts[start : start + _MOST_TEXTS])
            for place in self._decode([(number, 0, ids) for number, ids in part], last):
                # Each comes as a list of Python's floats.
                found.append(np.float32(self._context.get_logits_ith(place)))
        return np.stack(found)

    def read(self, ids: Sequence[int], first: int = 0) -> None:
        """Reads a text's tokens from place `first` on, behind those already read, for the last
        one's logits, which stay where they are."""
        if first == 0:
            self._context.kv_cache_clear(True)
        self._decode([(0, first, ids)], 1)
        self._context.synchronize()

    def _decode(self, texts: Sequence[tuple[int, int, Sequence[int]]], last: int) -> list[int]:
        """`texts`: number, first place and ids. Where in the batch logits were computed."""
        tokens = [
            (int(token), first + index, [number], len(ids) - index <= last)
            for number, first, ids in texts
            for index, token in enumerate(ids)
        ]
        batch = self._library.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
        for token in tokens:
            batch.add(*token)
        self._context.decode(batch)
        return [index for index, (*_, wanted) in enumerate(tokens) if wanted]


def _load(library, path: str | Path, num_tokens: int, exact: bool, threads: int | None):
    """(model, context) of cyllama."""

    class Model(library.LlamaModel):
        # cyllama 0.2.18's `get_logits_ith` asks for it, and it is not there.
        n_vocab = property(lambda self: self.get_vocab().n_vocab)

    given = library.LlamaModelParams()
    given.n_gpu_layers = 0
    model = Model(str(path), given)
    given = library.LlamaContextParams()
    given.n_ctx = given.n_batch = num_tokens
    given.n_seq_max, given.kv_unified = _MOST_TEXTS, True
    given.n_threads = given.n_threads_batch = threads or num_processors()
    if exact:
        given.type_k = given.type_v = _F32
        given.flash_attn_type = _NO_FLASH
    return model, library.LlamaContext(model, given)


def num_processors() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def time_reading(
    read: Callable[[Sequence[int], int], None], vocab_size: int, repeats: int = 5
) -> dict[str, Any]:
    """Tokens a second of `read(ids, first)`: PROMPT at once, then WRITTEN one by one; medians.

    What the tokens are plays no part, nor does choosing them.
    """
    ids = np.random.default_rng(0).integers(0, vocab_size, PROMPT + WRITTEN).tolist()
    read(ids[:PROMPT], 0)  # what is loaded or compiled when first needed
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        read(ids[:PROMPT], 0)
        middle = time.perf_counter()
        for place in range(PROMPT, PROMPT + WRITTEN):
            read(ids[place : place + 1], place)
        seconds.append((middle - start, time.perf_counter() - middle))
    reading, writing = (statistics.median(times) for times in zip(*seconds))
    return {
        "prompt_tokens": PROMPT,
        "read_tokens_per_second": PROMPT / reading,
        "write_tokens_per_second": WRITTEN / writing,
        "repeats": repeats,
        "cores": num_processors(),
    }


def peak_memory() -> int:
    """Bytes of memory that this process has held at most, mapped files among them."""
    status = Path("/proc/self/status")  # getrusage's would be the parent's, where that held more
    if status.exists():
        (line,) = (
            line for line in status.read_text("utf-8").splitlines() if line.startswith("VmHWM")
        )
        return 1024 * int(line.split()[1])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def main(path: str) -> None:
    """Prints speed, and the memory that the file takes over what Python and the library take."""
    import cyllama.llama.llama_cpp  # noqa: F401

    before = peak_memory()
    llama = LlamaCpp(path, PROMPT + WRITTEN, exact=False)
    found = time_reading(llama.read, llama.vocab_size) | {"memory_bytes": peak_memory() - before}
    print(json.dumps(found))


if __name__ == "__main__":
    from stablelm_jax.run_verb import run_verb

    run_verb(functools.partial(main, *sys.argv[1:]), "llama_cpp", prints_result=True)
