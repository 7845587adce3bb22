"""Byte-level BPE by Arcade100k's rules, its merges learned from the text at hand.

`python -m stablelm_jax.tokenizer.train_tokenizer` is the verb `stablelm_jax.train_tokenizer`.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

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


if __name__ == "__main__":
    from stablelm_jax.run_verb import run_verb
    from stablelm_jax.train_tokenizer import main

    run_verb(main, "train_tokenizer")
