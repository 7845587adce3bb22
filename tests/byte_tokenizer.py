"""A tokenizer that loads at once."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def write_byte_tokenizer(path: Path) -> Path:
    """A tokenizer of bytes and `<|endoftext|>`: every text is as long as it looks in UTF-8."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    engine = Tokenizer(models.BPE({letter: n for n, letter in enumerate(sorted(letters))}, []))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens(["<|endoftext|>"])
    engine.save(str(path))
    return path
