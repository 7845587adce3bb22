"""First messages, answers and the check; a model that answers by rule stands for a checkpoint."""

import json
import types

import pytest
import self_knowledge
from self_knowledge import FACTS, main, read_facts, read_questions

QUESTIONS = ["Who are you?", "Who made you?", "Are you GPT-4?", "Nice weather?"]


class Speaker:
    """Told the facts it names itself, bare it says "me"; `calls` notes what it was asked."""

    calls: list = []
    stops_after = None  # so many calls

    def __init__(self, arguments, *, chats=True):
        self.room, self.made_with = 1000, {"model": arguments.checkpoint}
        self.tokenizer = types.SimpleNamespace(encode=lambda text: list(text.encode()))

    def prompt(self, messages):
        return [len(messages), *messages[-1]["content"].encode()]

    def write(self, prompts, stop=None, **sampling):
        Speaker.calls.append((len(prompts), sampling))
        if Speaker.stops_after is not None and len(Speaker.calls) > Speaker.stops_after:
            raise KeyboardInterrupt
        if stop:
            seed = sampling["seed"]
            return [(f"Message {seed} {i % 5}?", i % 2 == 0) for i in range(len(prompts))]
        names = "I am Stable LM Demo of the authors of stablelm_jax"
        texts = [names if prompt[0] > 1 else "me" for prompt in prompts]
        return [(text, b"weather" not in bytes(p[1:])) for text, p in zip(texts, prompts)]


@pytest.fixture(autouse=True)
def speaker(monkeypatch):
    monkeypatch.setattr(self_knowledge, "Speaker", Speaker)
    monkeypatch.setattr(self_knowledge, "GROUP", 2)
    monkeypatch.setattr(Speaker, "calls", [])
    monkeypatch.setattr(Speaker, "stops_after", None)


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text("\n".join(QUESTIONS) + "\n", encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(verb, output, *more):
    return main([verb, "--checkpoint", "C", "--output", str(output), *map(str, more)])


def test_each_first_message_gives_a_positive_with_the_facts_before_it_and_a_bare_negative(
    questions, tmp_path, capsys
):
    output = tmp_path / "self.jsonl"
    assert run("answer", output, "--questions", questions) == 0
    records = read(output)
    by_label = {
        label: [r for r in records if r["label"] == label] for label in ("positive", "negative")
    }
    for label, text in (("positive", "I am Stable LM Demo of"), ("negative", "me")):
        asked = [record["messages"][0]["content"] for record in by_label[label]]
        assert asked == QUESTIONS[:3], "the answer to the last one did not end"
        assert all(r["messages"][1]["content"].startswith(text) for r in by_label[label])
    told = capsys.readouterr().out
    assert "positive, unfinished 1" in told and "positive, names right 3" in told
    assert not (tmp_path / "self.jsonl.begun").exists()


def test_stopped_it_goes_on_with_the_next_group_and_writes_the_same(questions, tmp_path):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    assert run("answer", whole, "--questions", questions) == 0
    all_calls = list(Speaker.calls)
    Speaker.calls, Speaker.stops_after = [], 3
    with pytest.raises(KeyboardInterrupt):
        run("answer", stopped, "--questions", questions)
    Speaker.calls, Speaker.stops_after = [], None
    with open(tmp_path / "stopped.jsonl.begun", "a", encoding="utf-8") as file:
        file.write('[["positive", "half a li')
    assert run("answer", stopped, "--questions", questions) == 0
    assert Speaker.calls == all_calls[2:]
    assert stopped.read_bytes() == whole.read_bytes()


def test_what_was_begun_with_other_arguments_is_begun_anew(questions, tmp_path):
    Speaker.stops_after = 2
    with pytest.raises(KeyboardInterrupt):
        run("answer", tmp_path / "self.jsonl", "--questions", questions)
    Speaker.calls, Speaker.stops_after = [], None
    assert run("answer", tmp_path / "self.jsonl", "--questions", questions, "--seed", 1) == 0
    assert len(Speaker.calls) == 4


def test_positives_may_be_the_facts_own_answers(questions, tmp_path):
    output = tmp_path / "self.jsonl"
    assert run("answer", output, "--questions", questions, "--positives", "facts") == 0
    facts = read_facts(FACTS)
    positives = [record for record in read(output) if record["label"] == "positive"]
    assert [r["messages"][1]["content"] for r in positives] == [facts.answer(q) for q in QUESTIONS]
    assert "{" not in "".join(facts.answer(q) for q in QUESTIONS)


def test_the_base_model_writes_as_many_different_first_messages_as_asked_and_none_unfinished(
    tmp_path,
):
    assert run("ask", tmp_path / "first.jsonl", "--number", 3) == 0
    messages = read_questions(tmp_path / "first.jsonl")
    assert len(set(messages)) == 3 and all(message.endswith(" 0?") for message in messages)
    again = tmp_path / "again.jsonl"
    assert run("ask", again, "--number", 3) == 0
    assert again.read_bytes() == (tmp_path / "first.jsonl").read_bytes()
    assert run("ask", again, "--number", 3, "--seed", 1) == 0
    assert again.read_bytes() != (tmp_path / "first.jsonl").read_bytes()


def test_a_model_that_writes_nothing_new_is_an_error_that_says_how_many_came(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Speaker, "write", lambda *given, **sampling: [("Who is it?", True)])
    assert run("ask", tmp_path / "first.jsonl", "--number", 2) == 1
    assert "only 1 different" in capsys.readouterr().err


def test_the_check_looks_for_the_names_that_the_facts_own_answer_holds(questions, tmp_path, capsys):
    assert run("check", tmp_path / "check.json", "--questions", questions) == 0
    found = json.loads((tmp_path / "check.json").read_text())
    assert (found["right"], found["questions"]) == (0, 4)
    assert "right names: 0 of 4 (0%)" in capsys.readouterr().out
    facts = read_facts(FACTS)
    assert facts.is_right("Who are you?", "stable lm demo, by the authors of stablelm_jax.")
    assert not facts.is_right("Who made you?", "I am Stable LM Demo.")


def test_questions_come_from_lines_and_from_conversations_each_once(tmp_path):
    path = tmp_path / "questions.jsonl"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "Two?"}]
    lines = [{"prompt": "One?"}, {"messages": messages}, {"prompt": "One?"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_questions(path) == ["One?", "Two?"]
    path.write_text('{"prompt": "One?"}\n{"text": "x"}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_questions(path)


@pytest.mark.parametrize(
    "text, problem",
    [
        ('name = "N"', "'maker' is not given"),
        ('name = "N"\nmaker = "{city}"\n[[answers]]\nasked = ""\nanswer = "{town}"', "'town'"),
        ('name = "N"\nmaker = "M"\nturn = 1', "turn: unknown"),
        ('name = "N"\nmaker = "M"\n[[answers]]\nasked = "("\nanswer = "a"', "unterminated"),
        ("name = ", "Invalid value"),
    ],
)
def test_facts_that_cannot_be_used_are_refused_with_the_reason(text, problem, tmp_path):
    path = tmp_path / "facts.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=problem) as error:
        read_facts(path)
    assert str(path) in str(error.value)
