"""A tokenizer as the files of a Hugging Face directory, and back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Engine

from stablelm_jax.interop.bpe_merges import merges
from stablelm_jax.tokenizer.ranks import RANKS_SHA256, spelled
from stablelm_jax.tokenizer.tokenizer import (
    ARCADE100K,
    FIRST_SPECIAL,
    PATTERN,
    SPECIAL_TOKENS,
    Arcade100k,
    HuggingFaceTokenizer,
    Tokenizer,
    load_tokenizer,
)

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
_RANKS = "arcade100k.tiktoken"  # what the first published directories held instead


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """The content of a tokenizer.json which gives the ids of `tokenizer`."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.content
    assert isinstance(tokenizer, Arcade100k)
    pairs = [(spelled(left), spelled(right)) for left, right in merges(tokenizer.ranks)]
    # The specials stand in the vocabulary: id 100256 is a hole, and `tokenizers` would number
    # tokens that are only added from there on.
    engine = Engine(models.BPE(vocab=tokenizer.vocabulary(), merges=pairs))
    engine.normalizer = normalizers.NFC()
    to_characters = pre_tokenizers.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    engine.pre_tokenizer = pre_tokenizers.Sequence([split, to_characters])
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([AddedToken(t, normalized=False) for t in tokenizer.specials])
    spec = json.loads(engine.to_str())
    spec["decoder"] |= {"add_prefix_space": False, "trim_offsets": False}  # as the pre-tokenizer
    return json.dumps(spec, ensure_ascii=False).encode()


def tokenizer_config(
    tokenizer: Tokenizer, eos: str, max_positions: int, chat_template: str | None
) -> dict[str, Any]:
    """The content of a tokenizer_config.json; `eos` ends a text, or a turn of a chat."""
    end_of_document = tokenizer.decode([tokenizer.eod])
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": end_of_document,
        "eos_token": eos,
        "pad_token": end_of_document,
        "unk_token": end_of_document,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
    }
    return values | ({"chat_template": chat_template} if chat_template else {})


def read_tokenizer(folder: Path, named: str | None = None) -> Tokenizer:
    """The tokenizer of a directory: Arcade100k where it is that one, else its tokenizer.json.

    Where one is `named`, by a name or a file, it is taken instead. A ValueError where there is none
    that can be read.
    """
    if named:
        return load_tokenizer(named)
    ranks, file = folder / _RANKS, folder / TOKENIZER
    if ranks.is_file() and hashlib.sha256(ranks.read_bytes()).hexdigest() == RANKS_SHA256:
        return Arcade100k(ranks.read_bytes())
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no {TOKENIZER}; name the model's tokenizer with --tokenizer, "
            f"{ARCADE100K} or a file"
        )
    own = load_tokenizer(file)
    return load_tokenizer(ARCADE100K) if _is_arcade(own) else own


# Where tokenizers with this vocabulary differ: digits, contractions, runs of spaces, scripts.
_PROBES = (
    "In 2024, 1234567 people SHOULDN'T've paid €3.14159; it's 10,000 too many!!!\n\n  done\r\n",
    "def f(x):\n    return  x ** 2 \t# ok   \n\n\n\tÜbergrößenträger, naïveté, señor, ação",
    "日本語のテキスト、한국어 텍스트 و نص عربي 🙂👩‍👩‍👧 ½ ² Ⅳ",
)


def _is_arcade(own: HuggingFaceTokenizer) -> bool:
    """Whether it has Arcade100k's vocabulary, no token more, and splits and joins as it does."""
    if own.largest_id != FIRST_SPECIAL + len(SPECIAL_TOKENS) - 1:
        return False
    try:
        arcade = load_tokenizer(ARCADE100K)
    except ValueError:  # its ranks are not to be had here
        return False
    return arcade.vocabulary().items() <= own.vocabulary().items() and all(
        own.encode(text) == arcade.encode(text) for text in _PROBES
    )
