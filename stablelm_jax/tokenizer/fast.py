"""quicktok in place of tiktoken's engine, where it is installed: the same ids in less time.

Its scanner `qwen` splits as Arcade100k does. Nothing of it is taken on trust: it begins only after
it gave tiktoken's ids for a stress text, and `prepare` holds it to them in a sample of each chunk.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from stablelm_jax.tokenizer.long_text import normalise

_NAME = "arcade100k"
# Every fifth character there is, beside words, digits and blanks; and what splits oddly: the
# apostrophes of contractions (U+017F is an `s` to them), blanks of all kinds before line ends,
# combining marks without a letter.
_CHARACTERS = [chr(c) for c in range(0, 0x32000, 5) if not 0xD800 <= c <= 0xDFFF]
STRESS_TEXT = normalise(
    "".join(f"a{c}a {c} 1{c}\n" for c in _CHARACTERS)
    + "don't DON'T 'tis it'\u017f \u212a's 12345 \u0661\u0662\u0663 a\u0301 \u0301a x\u20e3\r\n"
    " \t \u00a0\u3000 \n\n \r \u2028x   y \u0085 <|endoftext|> <|im_start|> ___ ==== \U0001f680\n"
)


class FastEngine:
    """Texts, in NFC, to ids by quicktok; `name`: with its version."""

    def __init__(self, pattern: str, ranks: Mapping[bytes, int]):
        import quicktok

        self.name = f"quicktok {version('quicktok-v1')}"
        vocabulary = [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode()}
            for token, rank in ranks.items()
        ]
        config = {"pattern": pattern, "default_vocab_size": len(ranks)}
        with tempfile.TemporaryDirectory() as folder:
            # Of the files that it imports, the one that needs no list of merges.
            file = Path(folder) / "tekken.json"
            content = {"config": config, "vocab": vocabulary}
            file.write_text(json.dumps(content), encoding="utf-8")
            with contextlib.redirect_stdout(io.StringIO()):
                quicktok.import_tokenizer(str(file), _NAME, folder)
            self._engine = quicktok.Tokenizer(_NAME, folder)

    def encode(self, texts: Sequence[str], end: int) -> list[np.ndarray]:
        """Ids of each text, int32, and `end`; TypeError where one holds a lone surrogate."""
        flat, offsets = self._engine.encode_batch(texts, threads=1)
        flat = np.insert(flat.view(np.int32), offsets[1:], end)  # at once: an array each is slow
        edges = (offsets + np.arange(len(offsets))).tolist()
        return [flat[first:last] for first, last in zip(edges, edges[1:])]


def fast_engine(
    pattern: str, ranks: Mapping[bytes, int], reference: Callable[[str], np.ndarray]
) -> tuple[FastEngine | None, str]:
    """The engine where it is installed and gives the ids of `reference`; else why not, or ""."""
    if not find_spec("quicktok"):
        return None, ""
    try:
        engine = FastEngine(pattern, ranks)
        if np.array_equal(engine.encode([STRESS_TEXT], 0)[0][:-1], reference(STRESS_TEXT)):
            return engine, ""
        return None, f"{engine.name} gives other ids than tiktoken for a stress text"
    except Exception as error:  # of another version of it, or of what it holds itself against
        return None, f"quicktok cannot be used ({type(error).__name__}: {error})"
