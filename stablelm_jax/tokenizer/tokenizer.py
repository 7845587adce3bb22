"""Text to token ids and back: Arcade100k on tiktoken, or any Hugging Face `tokenizer.json`.

Arcade100k is OpenAI's cl100k ranks with single digits, NFC and 32 special tokens (Stable LM 2
technical report; the published tokenizer class). It is rebuilt here from the ranks alone.
"""

from __future__ import annotations

import abc
import base64
import collections
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from stablelm_jax.tokenizer.fast import FastEngine, fast_engine
from stablelm_jax.tokenizer.long_text import LONG_RUN, encode_in_parts, normalise, split_long_runs
from stablelm_jax.tokenizer.ranks import find_ranks, spelled

ARCADE100K = "arcade100k"

# cl100k's split pattern as first published, in order of preference, but for the third alternative,
# which took three number characters.
_ALTERNATIVES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"\p{N}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)
PATTERN = "|".join(_ALTERNATIVES)
# The same with the five that look at nothing ahead in a group. It splits alike, but the engine runs
# the group as one automaton: 1.4 times the speed (benchmarks/tokenize.py).
_GROUPED_PATTERN = "(?:" + "|".join(_ALTERNATIVES[:5]) + ")|" + "|".join(_ALTERNATIVES[5:])
# Ids 0..100255 are the ranks, 100256 is a hole, the specials follow in this order.
FIRST_SPECIAL = 100_257
SPECIAL_TOKENS = (
    '<|endoftext|>', '<|fim_prefix|>', '<|fim_middle|>', '<|fim_suffix|>', '<|fim_pad|>',
    '<gh_stars>', '<filename>', '<issue_start>', '<issue_comment>', '<issue_closed>',
    '<jupyter_start>', '<jupyter_text>', '<jupyter_code>', '<jupyter_output>', '<empty_output>',
    '<commit_before>', '<commit_msg>', '<commit_after>', '<reponame>', '<|endofprompt|>',
    '<|im_start|>', '<|im_end|>', '<|pause|>', '<|reg0|>', '<|reg1|>', '<|reg2|>', '<|reg3|>',
    '<|reg4|>', '<|reg5|>', '<|reg6|>', '<|reg7|>', '<|extra0|>',
)  # fmt: skip
# What ends a document, by the first of these that a tokenizer.json knows.
END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")


class TokenizerError(ValueError):
    """One document cannot be encoded; the tokenizer is unharmed and goes on with the next."""


class Tokenizer(abc.ABC):
    """What the rest of the house knows of a tokenizer."""

    name: str  # what `load_tokenizer` was given
    engine: str  # the library that makes the ids, and its version
    engine_problem = ""  # why a faster one that is installed is not used
    largest_id: int
    eod: int  # id of the token that ends a document
    sha256: str  # identifies the mapping from text to ids
    special_ids: frozenset[int]  # tokens that stand for no text
    unknown_id: int | None = None  # of the token that stands for what the tokenizer does not know

    @property
    def vocab_size(self) -> int:
        """Embedding rows: the ids, padded to a multiple of 128."""
        # 100,289 ids -> 100,352 rows (Stable LM 2), 50,277 -> 50,304 (StableLM-3B-4E1T).
        return -(-(self.largest_id + 1) // 128) * 128

    @abc.abstractmethod
    def _ids(self, text: str, specials: bool) -> np.ndarray:
        """What `encode` gives, as int32 [tokens]."""

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Ids of a text; only with `specials` is the spelling of a special token more than text.

        Raises TokenizerError if this text cannot be encoded (a lone surrogate, an engine failure).
        """
        return self._ids(text, specials).tolist()

    def encode_document(self, text: str) -> np.ndarray:
        """`encode(text)` as an array, int32 [tokens]."""
        return self._ids(text, specials=False)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray | TokenizerError]:
        """Ids of each text, with `eod` at their end; or the error of one that cannot be encoded."""
        found = []
        for text in texts:
            try:
                found.append(self._encode_ended(text))
            except TokenizerError as error:
                found.append(error)
        return found

    def _encode_ended(self, text: str) -> np.ndarray:
        return np.append(self.encode_document(text), np.int32(self.eod))

    def use_fast_engine(self, wanted: bool = True) -> None:
        """`encode_documents` takes a faster engine of the same ids, where there is one."""
        del wanted  # for most there is none

    def agrees(self, text: str, ids: np.ndarray) -> bool:
        """Whether the engine that needs no trust gives the ids of `encode_documents` too."""
        return True

    @abc.abstractmethod
    def vocabulary(self) -> dict[str, int]:
        """{token: id} with the specials, each token spelled as in a tokenizer.json."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; U+FFFD for bytes that are no UTF-8 and for ids that stand for nothing."""

    def lost_characters(self, text: str, ids: Sequence[int]) -> collections.Counter[str]:
        """How many of each character of a text, in NFC, do not come back from its `ids`."""
        ids = [i for i in ids if i != self.unknown_id]
        text, found = normalise(text), normalise(self.decode(ids))
        if text == found:  # by far the most: counting takes ten times as long
            return collections.Counter()
        return collections.Counter(text) - collections.Counter(found)


class Arcade100k(Tokenizer):
    """Stable LM 2's tokenizer. Round trip: `decode(encode(text)) == NFC(text)`.

    `rank_file`: the cl100k ranks as they are published, lines of base64 and rank.
    """

    def __init__(self, rank_file: bytes):
        self.name = ARCADE100K
        self.engine = self._reference_engine = f"tiktoken {version('tiktoken')}"
        self._fast: FastEngine | None = None
        self.specials = {t: FIRST_SPECIAL + i for i, t in enumerate(SPECIAL_TOKENS)}
        self.largest_id = FIRST_SPECIAL + len(SPECIAL_TOKENS) - 1
        self.eod = self.specials["<|endoftext|>"]
        self.special_ids = frozenset(self.specials.values())
        decide_ids = {
            "ranks": hashlib.sha256(rank_file).hexdigest(),
            "pattern": PATTERN,
            "specials": SPECIAL_TOKENS,
            "first_special": FIRST_SPECIAL,
            "normalisation": "NFC",
        }
        self.sha256 = hashlib.sha256(json.dumps(decide_ids, sort_keys=True).encode()).hexdigest()
        pairs = (line.split() for line in rank_file.splitlines() if line)
        self.ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        self._encoding = self._engine(_GROUPED_PATTERN)
        self._any_special = re.compile("(" + "|".join(map(re.escape, self.specials)) + ")")

    def _engine(self, pattern: str):
        import tiktoken

        return tiktoken.Encoding(
            self.name, pat_str=pattern, mergeable_ranks=self.ranks, special_tokens=self.specials
        )

    @functools.cached_property
    def _piece_encoding(self):
        """Takes a whole run of whitespace as one piece: only merges, no look-ahead."""
        return self._engine(r"\s+")

    def use_fast_engine(self, wanted: bool = True) -> None:
        found = fast_engine(PATTERN, self.ranks, self.encode_document) if wanted else (None, "")
        self._fast, self.engine_problem = found
        self.engine = self._fast.name if self._fast else self._reference_engine

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray | TokenizerError]:
        if not self._fast or not texts:
            return super().encode_documents(texts)
        try:
            return self._fast.encode(list(map(normalise, texts)), self.eod)
        except TypeError:  # a text that has no ids
            return super().encode_documents(texts)

    def agrees(self, text: str, ids: np.ndarray) -> bool:
        return not self._fast or np.array_equal(ids, self._encode_ended(text))

    def _ids(self, text: str, specials: bool) -> np.ndarray:
        text = normalise(text)
        if not specials:
            return self._encode_normal(text)
        parts = self._any_special.split(text)
        ids = [self.specials.get(part) for part in parts]
        return np.concatenate(
            [
                self._encode_normal(part) if known is None else np.array([known], np.int32)
                for part, known in zip(parts, ids)
            ]
        )

    def vocabulary(self) -> dict[str, int]:
        return {spelled(token): rank for token, rank in self.ranks.items()} | self.specials

    def decode(self, ids: Sequence[int]) -> str:
        # 0xff is never UTF-8: an id without text (the hole, the padding) is replaced, too.
        ids = list(map(int, ids))
        try:
            text = self._encoding.decode_bytes(ids)
        except (KeyError, OverflowError):  # an id without text
            text = b"".join([self._token_bytes.get(i, b"\xff") for i in ids])
        return text.decode("utf-8", errors="replace")

    @functools.cached_property
    def _token_bytes(self) -> dict[int, bytes]:
        table = {rank: token for token, rank in self.ranks.items()}
        return table | {i: token.encode() for token, i in self.specials.items()}

    def _encode_normal(self, text: str, long_run: int = LONG_RUN) -> np.ndarray:
        if len(text) < long_run:
            return self._run(self._encoding, text)
        parts = [
            self._run(self._piece_encoding if is_piece else self._encoding, text[start:end])
            for start, end, is_piece in split_long_runs(text, long_run)
        ]
        return np.concatenate(parts)

    def _run(self, engine, text: str) -> np.ndarray:
        with _failing_alone(text):
            return engine.encode_to_numpy(text, disallowed_special=()).view(np.int32)


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, as the `tokenizers` library runs it; no BOS, padding or truncation."""

    def __init__(self, content: bytes, name: str):
        import tokenizers

        self.name, self.content = name, content
        self.engine = f"tokenizers {version('tokenizers')}"
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            spec = json.loads(content)
            added = {token["content"]: token for token in spec["added_tokens"]}
            end = next((end for end in END_OF_DOCUMENT if end in added), None)
            if end is not None:
                added[end]["special"] = True  # so that text cannot forge it
            self._with_specials = tokenizers.Tokenizer.from_str(json.dumps(spec))
            self._ordinary = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"{name}: not a Hugging Face tokenizer.json ({error!r})") from error
        if end is None:
            raise ValueError(
                f"{name}: no token to end a document with: its added_tokens hold none of "
                f"{', '.join(END_OF_DOCUMENT)}; add <|endoftext|> there"
            )
        for engine in (self._with_specials, self._ordinary):
            engine.no_truncation()
            engine.no_padding()
        self._ordinary.encode_special_tokens = True
        self._known = set(self.vocabulary().values())
        self.largest_id = max(self._known)
        self.eod = self._ordinary.token_to_id(end)
        model = spec.get("model", {})
        self.unknown_id = model.get("unk_id")
        if model.get("unk_token") is not None:
            self.unknown_id = self._ordinary.token_to_id(model["unk_token"])
        added = self._ordinary.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    def __reduce__(self):
        # Pickled by itself the engine forgets `encode_special_tokens`, and text could forge an eod.
        return HuggingFaceTokenizer, (self.content, self.name)

    def _ids(self, text: str, specials: bool) -> np.ndarray:
        engine = self._with_specials if specials else self._ordinary
        encode = functools.partial(engine.encode, add_special_tokens=False)
        with _failing_alone(text):
            parts = [np.asarray(ids, np.int32) for ids in encode_in_parts(encode, text)]
        return np.concatenate(parts)

    def vocabulary(self) -> dict[str, int]:
        return self._ordinary.get_vocab(with_added_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        text = ""
        for known, span in itertools.groupby(map(int, ids), self._known.__contains__):
            span = list(span)
            decoded = self._ordinary.decode(span, skip_special_tokens=False) if known else ""
            text += decoded if known else "\ufffd" * len(span)
        return text


def load_tokenizer(name_or_path: str | os.PathLike, *, ranks: str | None = None) -> Tokenizer:
    """The tokenizer 'arcade100k', or that of a `tokenizer.json` or of the folder that holds one.

    `ranks` is a file of cl100k ranks for arcade100k; else `find_ranks` looks for one. Raises
    ValueError: no such tokenizer, no ranks to be had, or a file that is not what it should be.
    """
    if name_or_path == ARCADE100K:
        return Arcade100k(find_ranks(ranks))
    path = Path(name_or_path)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"no tokenizer {str(name_or_path)!r}: it is neither {ARCADE100K!r} nor an existing "
            "Hugging Face tokenizer.json"
        )
    if ranks is not None:
        raise ValueError(f"ranks are for {ARCADE100K!r}; {path} brings its own: leave them out")
    return HuggingFaceTokenizer(path.read_bytes(), str(name_or_path))


@contextlib.contextmanager
def _failing_alone(text: str) -> Iterator[None]:
    """Every way that the engines have of failing on a text is a TokenizerError."""
    try:
        yield
    except BaseException as error:
        # A Rust panic arrives as pyo3's PanicException: no Exception, and no module to import it
        # from. `tokenizers` raises bare Exception, and TypeError for a lone surrogate.
        is_panic = type(error).__name__ == "PanicException"
        is_failure = isinstance(error, Exception) and not isinstance(error, MemoryError)
        if not isinstance(text, str) or not (is_panic or is_failure):
            raise
        raise TokenizerError(f"this text cannot be encoded: {error}") from error
