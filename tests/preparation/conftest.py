"""For all tests of the preparation."""

import pytest
from byte_tokenizer import write_byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    return str(write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))
