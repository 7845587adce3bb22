"""The sources of tiny.py with a tokenizer that llama.cpp reads, and a checkpoint for them."""

from pathlib import Path
from unittest import mock

import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_tiny_config = tiny.tiny_config


def write_bytes_tokenizer(path: Path) -> Path:
    """Bytes, one merge and `<|endoftext|>`: llama.cpp reads no tokenizer of words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: number for number, token in enumerate([*letters, "th"])}
    tokenizer = Tokenizer(models.BPE(tokens, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path))
    return path


def config_of(data: Path, **overrides):
    """The config of a run on them: 320 rows of vocabulary, of which the tokenizer has 258."""
    return _tiny_config(data, **{"model.vocab_size": 320, **overrides})


def write_files(folder: Path) -> tuple[Path, Path]:
    """(data, checkpoint of random weights) in a folder."""
    with mock.patch.object(tiny, "write_tokenizer", write_bytes_tokenizer):
        data = tiny.write_data(folder / "data")
    with mock.patch.object(tiny, "tiny_config", config_of):
        return data, tiny.write_parent(folder / "global_step3", data)
