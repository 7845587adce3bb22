"""The tokenizer section of a GGUF file, from a `tokenizer.json`.

llama.cpp runs byte-level BPE by itself: it wants the tokens, what kind each is, the merges, and the
name (`tokenizer.ggml.pre`) of one of the splits into words that it was built with. It does not
normalise: text that is not NFC has to be made so by who hands it over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from gguf import GGUFWriter, TokenType

from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.interop.tokenizer_files import tokenizer_json
from stablelm_jax.tokenizer.chat import plain_jinja
from stablelm_jax.tokenizer.tokenizer import END_OF_DOCUMENT, PATTERN

# What every tokenizer.json must have here, or leave out, to mean the same in llama.cpp.
_PLAIN = {
    "type": ("BPE",),
    "dropout": (None, 0.0),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (False,),
    "ignore_merges": (False,),
}
_ARCADE_SPLIT = {
    "type": "Split",
    "pattern": {"Regex": PATTERN},
    "behavior": "Isolated",
    "invert": False,
}


class Vocabulary(NamedTuple):
    """A byte-level BPE as llama.cpp reads it; tokens and types are one for each row."""

    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]


def add_tokenizer(writer: GGUFWriter, checkpoint: SavedModel) -> None:
    """Adds the checkpoint's, what ends a text, and that nothing is put before or after one.

    Raises:
      ValueError: llama.cpp could not run it.
    """
    tokenizer = checkpoint.tokenizer
    found = vocabulary(tokenizer_json(tokenizer), checkpoint.model.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    writer.add_token_merges(found.merges)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_bos_token_id(tokenizer.eod)
    writer.add_eos_token_id(checkpoint.end_ids[0])
    writer.add_pad_token_id(tokenizer.eod)
    if checkpoint.chat_template:
        writer.add_eot_token_id(checkpoint.end_ids[0])
        writer.add_chat_template(plain_jinja(checkpoint.chat_template))


def vocabulary(content: bytes, rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer.json, filled up to the rows of the embedding.

    Raises:
      ValueError: llama.cpp could not run it, or it has more ids than there are rows.
    """
    spec = json.loads(content)
    model = spec["model"]
    for key, allowed in _PLAIN.items():
        if model.get(key, allowed[0]) not in allowed:
            raise ValueError(
                f"the tokenizer has {key} = {model[key]!r}: llama.cpp would give other ids than "
                "those of the training; GGUF export writes plain byte-level BPE only, the kind of "
                "Arcade100k and of stablelm_jax.train_tokenizer"
            )
    if spec.get("normalizer") not in (None, {"type": "NFC"}):
        raise ValueError(
            f"the tokenizer normalises by {spec['normalizer'].get('type')}; llama.cpp normalises "
            "nothing, so only none and NFC, which most text is in, can be written"
        )
    pre = _name_of_split(spec.get("pre_tokenizer") or {})
    added = {token["id"]: token for token in spec["added_tokens"]}
    texts = {number: text for text, number in model["vocab"].items()}
    texts |= {number: token["content"] for number, token in added.items()}
    if max(texts) >= rows:
        raise ValueError(
            f"the tokenizer has ids up to {max(texts)}, but the model only {rows} rows: it is the "
            "tokenizer of another model; name the right one with --tokenizer"
        )

    def type_of(row: int) -> TokenType:
        if row not in added:
            return TokenType.NORMAL if row in texts else TokenType.UNUSED
        # The end of a document is special to us whatever the file says: no text may forge it.
        special = added[row]["special"] or added[row]["content"] in END_OF_DOCUMENT
        return TokenType.CONTROL if special else TokenType.USER_DEFINED

    return Vocabulary(
        pre=pre,
        # A row without a token, in the padding or in a hole: any text that no other token has.
        tokens=[texts.get(row, f"[PAD{row}]") for row in range(rows)],
        types=[type_of(row) for row in range(rows)],
        merges=[pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
    )


def _name_of_split(pre_tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for the split into words.

    `stablelm2` is Arcade100k's. `gpt-2` is that of the ByteLevel step alone, as in the GPT-NeoX
    tokenizer of StableLM-3B-4E1T.
    """
    is_sequence = pre_tokenizer.get("type") == "Sequence"
    *splits, last = pre_tokenizer["pretokenizers"] if is_sequence else [pre_tokenizer]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        splits_too = last.get("use_regex", True)
        if splits_too and not splits:
            return "gpt-2"
        if not splits_too and splits == [_ARCADE_SPLIT]:
            return "stablelm2"
    kinds = ", ".join(str(step.get("type")) for step in (*splits, last))
    raise ValueError(
        f"llama.cpp has no split into words like that of this tokenizer ({kinds}): of those it "
        "has, Arcade100k's ('stablelm2') and the plain ByteLevel ('gpt-2') are written here"
    )
