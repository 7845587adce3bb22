import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from stablelm_jax.generation.text import answer, as_text
from stablelm_jax.tokenizer import chat as chat_lib
from stablelm_jax.tokenizer.chat import chat_template
from stablelm_jax.tokenizer.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A token for each byte, and the special tokens of the templates."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    path = tmp_path_factory.mktemp("bytes") / "tokenizer.json"
    tokenizer.save(str(path))
    return load_tokenizer(path)


class Parrot:
    """In place of a Generator: answers every prompt with the same tokens."""

    def __init__(self, tokens, max_length=1000):
        self.tokens, self.max_length = tokens, max_length
        self.prompts = []

    def stream(self, prompt, **settings):
        self.prompts.append(list(prompt))
        self.settings = settings
        for token in self.tokens:
            yield [token]


def said(parrot, tokenizer, template, chat, text):
    """The answer to `text`, which becomes a part of the chat."""
    chat.append({"role": "user", "content": text})
    template = chat_template(template, tokenizer)
    return answer(parrot, tokenizer, template, chat, {"max_new_tokens": 20})


def test_a_letter_is_shown_when_its_last_byte_has_come(tokenizer):
    ids = tokenizer.encode("aß日!")
    assert len(ids) == 7
    assert list(as_text(tokenizer, [[i] for i in ids])) == ["a", "ß", "日", "!"]
    assert list(as_text(tokenizer, [ids[:2], [], ids[2:5], ids[5:]])) == ["a", "ß", "日!"]


def test_bytes_that_never_become_a_letter_are_shown_at_the_end(tokenizer):
    ids = tokenizer.encode("a日")[:-1]
    assert "".join(as_text(tokenizer, [ids])) == "a\ufffd"


def test_an_answer_is_part_of_what_the_next_one_reads(tokenizer):
    parrot = Parrot(tokenizer.encode("yes"))
    chat = [{"role": "system", "content": "Be brief."}]
    assert "".join(said(parrot, tokenizer, "chatml", chat, "really?")) == "yes"
    list(said(parrot, tokenizer, "chatml", chat, "sure?"))
    assert tokenizer.decode(parrot.prompts[1]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nreally?<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert parrot.settings == {"max_new_tokens": 20, "go_on": True}


def test_an_answer_that_is_broken_off_stays_as_far_as_it_was_read(tokenizer):
    parrot = Parrot(tokenizer.encode("yes"))
    chat = []
    pieces = said(parrot, tokenizer, "zephyr", chat, "a")
    assert next(pieces) == "y"
    pieces.close()
    list(said(parrot, tokenizer, "zephyr", chat, "b"))
    assert "<|assistant|>\ny<|endoftext|>\n<|user|>\nb" in tokenizer.decode(parrot.prompts[1])


def test_a_message_that_was_interrupted_before_it_was_read_is_taken_away(tokenizer, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_lib, "encode_chat", interrupted)
    chat = []
    with pytest.raises(KeyboardInterrupt):
        list(said(Parrot([]), tokenizer, "zephyr", chat, "a"))
    assert chat == []


def test_a_conversation_that_outgrows_the_context_forgets_its_oldest_turns(tokenizer, capsys):
    parrot = Parrot(tokenizer.encode("yes"), max_length=120)
    chat = [{"role": "system", "content": "S"}]
    for text in ("one", "two", "three"):
        list(said(parrot, tokenizer, "zephyr", chat, text))
    last = tokenizer.decode(parrot.prompts[-1])
    assert len(parrot.prompts[-1]) <= 100 and "no longer fit" in capsys.readouterr().err
    assert last.startswith("<|system|>\nS") and "one" not in last and "three" in last


def test_the_history_holds_the_very_ids_that_were_generated(tokenizer):
    """Not those of their text: another split of it, and a special token that was written out."""
    written = [*tokenizer.encode("a"), *tokenizer.encode("<|im_start|>", specials=True)]
    parrot, chat = Parrot(written), []
    for text in ("one", "two"):
        list(said(parrot, tokenizer, "chatml", chat, text))
    first, second = parrot.prompts
    assert second[: len(first) + len(written)] == first + written
    assert tokenizer.decode(second[len(first) + len(written) :]).startswith("<|im_end|>\n")


def test_what_cannot_be_read_leaves_the_conversation_as_it_was(tokenizer):
    parrot, chat = Parrot(tokenizer.encode("yes"), max_length=120), []
    list(said(parrot, tokenizer, "zephyr", chat, "one"))
    before = list(chat)
    with pytest.raises(ValueError, match="more than 120, the context: shorten it"):
        list(said(parrot, tokenizer, "zephyr", chat, "long " * 30))
    assert chat == before and len(parrot.prompts) == 1
