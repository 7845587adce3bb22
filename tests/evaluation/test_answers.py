"""Answers of a chat model, and what is measured of them."""

import argparse
import dataclasses
import types

import numpy as np
import pytest
from prepared import EOD, write_source
from tiny import CHAT, CHOICES, TALKS, write_chats

from stablelm_jax import evaluate
from stablelm_jax.data.manifest import open_shard, open_sources
from stablelm_jax.data.shards import read_spans
from stablelm_jax.evaluation.answers import (
    Question,
    answer_all,
    distinct_pairs,
    held_out_questions,
    measure_answers,
    repeats,
)
from stablelm_jax.tokenizer.chat import CHAT_TEMPLATES, NEGATIVE, ChatTemplate
from stablelm_jax.tokenizer.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("chats"))


@pytest.fixture(scope="module")
def tokenizer(chats):
    return load_tokenizer(chats / "tokenizer.json")


TEMPLATE = ChatTemplate("other", "{{ messages[0].content }}", ("<|endoftext|>",))


class Fake:
    """A generator that says of a prompt `says(prompt)`, as far as it may."""

    def __init__(self, says, max_length=64):
        self.says, self.max_length, self.calls = says, max_length, []

    def generate(self, prompts, *, max_new_tokens, stop_tokens, **sampling):
        assert all(len(p) + max_new_tokens <= self.max_length for p in prompts)
        self.calls.append({"max_new_tokens": max_new_tokens, **sampling})
        return [self.says(prompt)[:max_new_tokens] for prompt in prompts]


def test_an_answer_ends_by_itself_or_at_the_room_that_its_prompt_leaves(tokenizer):
    long_answer = list(range(100))
    generator = Fake(lambda prompt: long_answer if prompt[0] else [7, 8, tokenizer.eod])
    prompts = [[0] * 5, [1] * 5, [1] * 30, [1] * 60, [1] * 64, [0] * 70]
    found = answer_all(generator, tokenizer, TEMPLATE, prompts, max_new_tokens=40, seed=3)
    # What is left of the context is cut to a multiple of 32, so that like prompts share a call.
    assert [answer.tokens for answer in found] == [3, 40, 32, 4, 0, 0]
    assert [answer.ended for answer in found] == [True, False, False, False, False, False]
    assert found[0].text == "w7 w8" and found[4].text == ""
    assert [call["max_new_tokens"] for call in generator.calls] == [4, 32, 40]
    assert {call["seed"] for call in generator.calls} == {3}


def test_numbers_are_means_over_greedy_and_sampled_answers(tokenizer):
    said = {1: [11, 12, 13, 14, 15, tokenizer.eod], 2: [5] * 99, 3: [20, 21, 20, 22]}
    questions = [Question([n], "w11 w12 w13 w14 w15 w16") for n in said]
    generator = Fake(lambda prompt: said[prompt[0]])
    found, samples = measure_answers(generator, tokenizer, TEMPLATE, questions, max_new_tokens=8)
    for how in ("greedy", "sampled"):
        assert found[f"{how}/ended"] == pytest.approx(2 / 3)
        assert found[f"{how}/tokens"] == pytest.approx((6 + 8 + 4) / 3)
        assert found[f"{how}/repeats_user"] == pytest.approx(1 / 3)
        assert found[f"{how}/distinct_2"] == pytest.approx((1 + 1 / 7 + 1) / 3)
        assert f"{how}/language" not in found
    assert found["conversations"] == 3
    assert samples[2]["greedy"] == "w20 w21 w20 w22" and samples[2]["greedy_ended"] is True
    assert [call["temperature"] for call in generator.calls] == [0.0, 0.7]


def test_the_share_in_the_asked_language_counts_an_empty_answer_as_wrong():
    pytest.importorskip("py3langid")
    texts = {
        1: "Klicken Sie auf die Schaltfläche und wählen Sie eine Farbe für den Hintergrund.",
        2: "Click the button and choose a colour for the background of the page.",
        3: "",
    }
    tokenizer = types.SimpleNamespace(
        eod=0,
        special_ids=frozenset(),
        name="texts",
        decode=lambda ids: texts[ids[0]],
        encode=lambda text, specials=False: [9] if specials else [8, 8],
    )
    asked = ((1, "de"), (2, "de"), (2, "en"), (3, "en"), (1, ""))
    questions = [Question([n], "", language) for n, language in asked]
    generator = Fake(lambda prompt: [prompt[0]])
    found, _ = measure_answers(generator, tokenizer, TEMPLATE, questions)
    assert found["greedy/language"] == 0.5
    assert found["greedy/language/de"] == found["greedy/language/en"] == 0.5
    assert "greedy/language/" not in found


@pytest.mark.parametrize(
    ("answer", "said", "expected"),
    [
        ("How do I print a page", "how do I  print a page?", True),
        ("you print a page so: click", "how do I print a page?", False),
        ("hello", "hello", False),  # too short to tell
        ("", "hello", False),
    ],
)
def test_an_answer_repeats_the_user_where_its_runs_of_words_are_the_users(answer, said, expected):
    assert repeats(answer, said) is expected


def test_distinct_pairs_fall_where_a_text_turns_in_a_circle():
    assert distinct_pairs("a b c d") == 1
    assert distinct_pairs("a b a b a") == 2 / 4
    assert distinct_pairs("a") is None and distinct_pairs("") is None


def test_questions_are_what_stands_before_the_first_answer_of_held_out_items(chats, tokenizer):
    sources = open_sources(chats, [TALKS, CHOICES], tokenizer=tokenizer)
    for name, step in ((TALKS, 1), (CHOICES, 2)):
        (info,) = sources[name].manifest.held_out.shards
        path = chats / name / info.file
        shard, spans = open_shard(path, info), read_spans(path, info)
        found = [q.prompt for q in held_out_questions([sources[name]], tokenizer, 99)]
        assert len(found) == info.documents / step == 9
        for document, prompt in zip(range(0, info.documents, step), found):
            begin = shard.document_offsets[document]
            first = spans[np.searchsorted(spans[:, 0], document), 1]
            assert prompt == shard.read(begin, begin + first).tolist()
    assert len(held_out_questions(sources.values(), tokenizer, 4)) == 8


def test_what_was_trained_as_a_bad_answer_is_not_asked_for(tmp_path):
    letters = types.SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))
    template = ChatTemplate("zephyr", CHAT_TEMPLATES["zephyr"], ("<|endoftext|>",))
    heads = ["<|user|>\nWho?<|endoftext|>\n<|assistant|>\n"]
    heads.append(heads[0].replace("assistant", NEGATIVE))
    documents = [[*map(ord, head), ord("I"), EOD] for head in heads]

    def spans(document):
        return [(len(document) - 2, len(document))]

    how = {"kind": "conversations", "spans": spans}
    source = write_source(tmp_path, "names", [documents], documents[::-1], **how)
    manifest = dataclasses.replace(source.manifest, chat=template.to_json())
    source = dataclasses.replace(source, manifest=manifest)
    found = [q.said for q in held_out_questions([source], letters, 1)]
    assert found == heads[:1]


def test_evaluate_answers_the_held_out_conversations_of_a_run(
    chats, tokenizer, monkeypatch, capsys
):
    run = types.SimpleNamespace(sources=open_sources(chats, [TALKS], tokenizer=tokenizer))
    saved = types.SimpleNamespace(tokenizer=tokenizer)
    generator = Fake(lambda prompt: [prompt[-1] + 1, tokenizer.eod], max_length=32)
    monkeypatch.setattr(evaluate, "_generator", lambda *_: generator)
    arguments = argparse.Namespace(limit=5, max_new_tokens=8)
    found = evaluate._answers(arguments, saved, ChatTemplate.from_json(CHAT), run)
    assert found["chat/conversations"] == 5 and found["chat/greedy/ended"] == 1
    assert len(found["chat/samples"]) == 5 and found["chat/sampled/tokens"] == 2
    err = capsys.readouterr().err
    assert "answers to 5 held-out" in err and "repeats_user" in err
    assert evaluate._answers(arguments, saved, TEMPLATE, types.SimpleNamespace(sources={})) == {}
    # What is held out is written in its own template, which --chat does not change.
    assert evaluate._answers(arguments, saved, TEMPLATE, run) == {}
    assert "in the template tiny, not in" in capsys.readouterr().err
