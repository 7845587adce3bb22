"""A long document is encoded in parts by any tokenizer.json, and its ids are those of the whole."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, trainers
from tokenizers import normalizers as norm
from tokenizers import pre_tokenizers as pre

from stablelm_jax.tokenizer import long_text
from stablelm_jax.tokenizer.tokenizer import PATTERN, TokenizerError, load_tokenizer

SPECIALS = ["<|endoftext|>", "<unk>"]
CORPUS = [
    "hello world, hello there 123456 the-cat's  in    the hat\n\n\nfoo.bar()\r\n\tx = 1\n",
    "  中文，标点。 é e\u0301 İ ﬁ ½ 你好",
] * 20
# Groups of three digits from the right: what is a word depends on the end of the run.
DIGITS_FROM_THE_RIGHT = (
    r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))| ?\p{L}+|\s+(?!\S)|\s+| ?[^\s\p{L}\p{N}]+"
)
BYTES = pre.ByteLevel(add_prefix_space=False, use_regex=False)


def trained(model, trainer, splitter, normalizer=None, added=()):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(list(added))
    tokenizer.encode_special_tokens = True
    return tokenizer


def bpe(*args, **options):
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    return trained(models.BPE(**options), trainer, *args)


def split(*patterns):
    return pre.Sequence([*(pre.Split(Regex(p), "isolated") for p in patterns), BYTES])


def others(kind, *args):
    quiet = {"special_tokens": SPECIALS, "show_progress": False}
    if kind == "WordLevel":
        model, trainer = models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer(**quiet)
    elif kind == "WordPiece":
        model = models.WordPiece(unk_token="<unk>")
        trainer = trainers.WordPieceTrainer(vocab_size=300, **quiet)
    else:
        model = models.Unigram()
        trainer = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", **quiet)
    return trained(model, trainer, *args)


TOKENIZERS = {
    "gpt2": lambda: bpe(pre.ByteLevel(add_prefix_space=False)),
    "prefix_space": lambda: bpe(pre.ByteLevel(add_prefix_space=True)),
    "arcade100k": lambda: bpe(split(PATTERN), norm.NFC()),
    "digits_from_the_right": lambda: bpe(split(DIGITS_FROM_THE_RIGHT)),
    "deepseek": lambda: bpe(split("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"\p{N}")),
    "neox": lambda: bpe(
        pre.ByteLevel(add_prefix_space=False),
        norm.NFC(),
        [AddedToken(" " * n, normalized=True) for n in range(2, 8)],
    ),
    "eager_added_tokens": lambda: bpe(
        pre.ByteLevel(add_prefix_space=False),
        None,
        [AddedToken("hello", lstrip=True, rstrip=True), AddedToken("the", single_word=True)],
    ),
    "metaspace": lambda: bpe(pre.Metaspace(), unk_token="<unk>"),
    "metaspace_first": lambda: bpe(
        pre.Metaspace(prepend_scheme="first"),
        norm.Sequence([norm.NFKC(), norm.Replace(Regex(" {2,}"), "▁")]),
        unk_token="<unk>",
    ),
    "whitespace": lambda: others("WordLevel", pre.Whitespace(), norm.Strip()),
    "bert": lambda: others("WordPiece", pre.BertPreTokenizer(), norm.BertNormalizer()),
    "unigram": lambda: others(
        "Unigram", pre.Sequence([pre.WhitespaceSplit(), pre.Metaspace()]), norm.NFKC()
    ),
    "one_word": lambda: bpe(BYTES),
}
PIECES = st.one_of(
    st.sampled_from(
        ["hello", "the", " ", "  ", "    ", "\n", "\r\n", "\n\n\n", "\t", "'s", " the", "123",
         "1234567", ".", "---", "()", "中文", "，", "e\u0301", "\u0301", "é", "½", "ﬁ", "HELLO",
         "<|endoftext|>", "<unk>", "▁", "/", " x = 1\n", "\xa0", "\u3000", "😶"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
)  # fmt: skip
TEXTS = st.lists(PIECES, min_size=20, max_size=80).map("".join)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(long_text, "_WINDOW", 24)
    monkeypatch.setattr(long_text, "_OVERLAP", 6)
    monkeypatch.setattr(long_text, "_LARGEST", 10_000)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_ids_of_the_parts_are_those_of_the_whole(kind):
    tokenizer = TOKENIZERS[kind]()
    parts = 0

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    @settings(max_examples=40, deadline=None, database=None)
    @given(TEXTS)
    def check(text):
        nonlocal parts
        found = list(long_text.encode_in_parts(encode, text))
        assert sum(found, []) == encode(text).ids
        parts += len(found) - 1

    check()
    assert (parts == 0) if kind == "one_word" else (parts > 20)


@pytest.fixture
def one_word(tmp_path):
    path = tmp_path / "tokenizer.json"
    bpe(BYTES).save(str(path))
    return load_tokenizer(path)


def test_a_document_that_is_one_word_is_encoded_whole_up_to_a_limit_and_then_refused(
    one_word, monkeypatch
):
    text = "hello there " * 20
    whole = one_word.encode(text)
    assert one_word.decode(whole) == text
    monkeypatch.setattr(long_text, "_LARGEST", 96)
    with pytest.raises(TokenizerError, match="takes .* characters for one word.*cut the document"):
        one_word.encode_document(text)
    assert len(one_word.encode_document("hello there"))


def test_the_engine_never_sees_more_than_a_window_of_a_text_of_words(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    TOKENIZERS["gpt2"]().save(str(path))
    tokenizer = load_tokenizer(path)
    sizes = []
    whole = long_text.encode_in_parts

    def watched(encode, text):
        return whole(lambda part: sizes.append(len(part)) or encode(part), text)

    monkeypatch.setattr("stablelm_jax.tokenizer.tokenizer.encode_in_parts", watched)
    text = "hello there, the cat\n" * 50
    assert tokenizer.decode(tokenizer.encode_document(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, specials=True)) == text
    assert max(sizes) == 24
