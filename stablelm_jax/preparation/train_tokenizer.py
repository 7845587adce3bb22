"""A small tokenizer of one's own.

    python -m stablelm_jax.preparation.train_tokenizer --input F.jsonl ... --output tokenizer.json

Byte-level BPE by Arcade100k's rules (NFC, the same split into words, single digits), its merges
learned from the text at hand. A model of few million parameters spends nearly all of its time on a
vocabulary of 100,000 rows; with a few thousand it learns in minutes. Writes a `tokenizer.json` for
`prepare --tokenizer` and `config.data.tokenizer`. The same text gives the same file.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from stablelm_jax.storage.files import replacing
from stablelm_jax.tokenizer.tokenizer import PATTERN

END_OF_TEXT = "<|endoftext|>"


def train(texts: Iterable[str], rows: int) -> Tokenizer:
    """A tokenizer of `rows` ids; ValueError where they leave no room for the 256 bytes."""
    if rows < 257:
        raise ValueError(f"--rows {rows}: the 256 bytes and {END_OF_TEXT} need 257 at least")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=rows,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _texts(paths: Sequence[pathlib.Path]) -> Iterator[str]:
    for path in paths:
        with open(path, encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)["text"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Keeps a file that is there already. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0] + ".")
    parser.add_argument("--input", required=True, nargs="+", type=pathlib.Path, metavar="F.jsonl")
    parser.add_argument("--output", required=True, type=pathlib.Path, metavar="tokenizer.json")
    parser.add_argument("--rows", type=int, default=4096, help="size of the vocabulary")
    given = parser.parse_args(arguments)
    if given.output.exists():
        print(f"{given.output}: kept")
        return 0
    try:
        tokenizer = train(_texts(given.input), given.rows)
    except (ValueError, KeyError, OSError) as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 1
    with replacing(given.output) as aside:
        tokenizer.save(str(aside))
    print(f"{given.output}: {tokenizer.get_vocab_size():,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
