"""For all tests of the preparation."""

import pytest
import tokenizers


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    """A tokenizer of bytes: loads at once, and every text is as long as it looks."""
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: number for number, letter in enumerate(sorted(letters))}
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    engine.add_special_tokens(["<|endoftext|>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    engine.save(str(path))
    return str(path)
