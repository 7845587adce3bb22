"""Arcade100k as a tokenizer.json gives the same ids, on real text."""

import importlib.metadata
import json
import sysconfig
from pathlib import Path

import pytest
import tokenizers

from stablelm_jax.interop import tokenizer_files
from stablelm_jax.tokenizer.tokenizer import ARCADE100K, SPECIAL_TOKENS, load_tokenizer

LANGUAGES = (
    "Größenwahnsinnige Übermütigkeit überfällt 1234 Äpfel; L'été dernier, où étiez-vous ? "
    "¡Qué año! Não há coração que aguente. È già così, perché no? "
    "日本語 中文 한국어 русский ελληνικά عربي\r\n"
    "e\u0301 decomposed, ﬁ ligature, ½ fraction, Ⅷ, ①②③, \u00a0no-break\u2003em "
    "🙂👩\u200d👩\u200d👧  \t\n\n  end"
)


@pytest.fixture(scope="module")
def arcade():
    return load_tokenizer(ARCADE100K)


@pytest.fixture(scope="module")
def folder(arcade, tmp_path_factory):
    """What an export holds of the tokenizer."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "tokenizer.json").write_bytes(tokenizer_files.tokenizer_json(arcade))
    config = tokenizer_files.tokenizer_config(arcade, "<|im_end|>", 4096, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def real_texts():
    """Sources of the standard library and descriptions of the installed packages."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    for path in sources[::4]:
        yield path.read_text(encoding="utf-8")
    for distribution in importlib.metadata.distributions():
        yield distribution.read_text("METADATA") or ""
    yield LANGUAGES


def test_ids_of_real_text_are_equal(arcade, engine):
    tokens = 0
    for text in real_texts():
        for special in SPECIAL_TOKENS:
            text = text.replace(special, "")  # these the engine takes for what they spell
        ids = arcade.encode(text)
        assert engine.encode(text, add_special_tokens=False).ids == ids
        tokens += len(ids)
    assert tokens > 500_000


def test_specials_have_their_ids_and_text_comes_back(arcade, engine):
    assert engine.get_vocab_size() == 100_288  # 100,289 ids, one of which is a hole
    for token, number in arcade.specials.items():
        assert engine.token_to_id(token) == number
        assert engine.encode(f"a{token}b", add_special_tokens=False).ids[1] == number
    assert engine.decode(arcade.encode(LANGUAGES)) == arcade.decode(arcade.encode(LANGUAGES))


def test_a_vocabulary_is_the_same_from_ranks_and_from_a_file(arcade, folder):
    found = load_tokenizer(folder).vocabulary()
    assert found == arcade.vocabulary() and len(found) == 100_256 + len(SPECIAL_TOKENS)


def test_auto_tokenizer_loads_it_offline_and_adds_nothing(arcade, folder):
    transformers = pytest.importorskip("transformers")
    (folder / "config.json").write_text('{"model_type": "stablelm"}')
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer.is_fast
    assert tokenizer(LANGUAGES).input_ids == arcade.encode(LANGUAGES)
    assert tokenizer.decode(arcade.encode(LANGUAGES)) == arcade.decode(arcade.encode(LANGUAGES))
    ids = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert ids == (100257, 100278, 100257)


def test_it_is_recognised_when_it_comes_back_and_another_one_is_not(folder, tmp_path):
    assert tokenizer_files.read_tokenizer(folder).name == ARCADE100K
    spec = json.loads((folder / "tokenizer.json").read_text())
    split = spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    split["Regex"] = split["Regex"].replace(r"\p{N}|", r"\p{N}{1,3}|")  # cl100k's own
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    other = tokenizer_files.read_tokenizer(tmp_path)
    assert other.name != ARCADE100K and len(other.encode("123")) == 1


def test_one_with_more_tokens_is_kept_as_it_is(folder, tmp_path):
    spec = json.loads((folder / "tokenizer.json").read_text())
    more = {**spec["added_tokens"][0], "id": 100_289, "content": "<|tool|>"}
    spec["added_tokens"].append(more)
    spec["model"]["vocab"]["<|tool|>"] = 100_289
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    other = tokenizer_files.read_tokenizer(tmp_path)
    assert other.name != ARCADE100K and other.encode("<|tool|>", specials=True) == [100_289]
