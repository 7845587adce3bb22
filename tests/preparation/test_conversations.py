"""Conversations and pairs: every published form is read, what cannot be trained on is refused."""

import contextlib
import csv
import hashlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared import check_contents
from seeds import new_rng

from stablelm_jax import prepare
from stablelm_jax.data.manifest import read_manifest
from stablelm_jax.data.shards import Shard, read_spans
from stablelm_jax.preparation import chunks, held_out
from stablelm_jax.preparation.conversations import ChatEncoder, canonical
from stablelm_jax.preparation.prepare_source import Preparation
from stablelm_jax.preparation.streams import Rejected
from stablelm_jax.tokenizer.chat import chat_template, encode_chat, encode_conversation
from stablelm_jax.tokenizer.tokenizer import load_tokenizer

ROOT = pathlib.Path(prepare.__file__).parents[1]


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "s"}
OPENING = [user("a"), assistant("b"), user("c")]
SIDES = {"chosen": [assistant("d")], "rejected": [assistant("e")]}


def read(record):
    """What a record becomes: its canonical form, or the reason why there is none."""
    text = canonical(record)
    return text.reason if isinstance(text, Rejected) else json.loads(text)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [user("a"), assistant("b")], "prompt": "UltraChat has it too", "id": 3},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversations": [{"from": "user", "value": "a", "weight": 0.0},
                           {"from": "chatgpt", "value": "b", "weight": 1.0}]},
        {"messages": [{"role": "user", "content": "a", "value": None, "train": None},
                      {"role": "assistant", "content": "b", "name": "x", "train": True}]},
        {"conversation": [{"input": "a", "output": "b"}], "source": "Capybara"},
        {"items": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": "a", "completion": "b", "label": False, "messages": []},
        {"prompt": [user("a")], "completion": [assistant("b")]},
        {"instruction": "a", "input": "", "output": "b"},
        {"query": "a", "response": "b", "type": "MetaMathQA"},
        {"question": "a", "answer": "b", "system": None, "label": "positive"},
    ],
)  # fmt: skip
def test_every_published_form_of_a_conversation_is_the_same_one(record):
    assert read(record) == {"messages": [user("a"), assistant("b")]}


def test_input_follows_the_instruction_and_a_system_text_comes_first():
    record = {"instruction": "a", "input": "x", "output": "b", "system_prompt": "s"}
    assert read(record) == {"messages": [SYSTEM, user("a\n\nx"), assistant("b")]}
    record = {"system": "other", "messages": [SYSTEM, user("a"), assistant("b")]}
    assert read(record) == {"messages": record["messages"]}


def test_what_is_not_to_be_trained_and_what_is_negative_is_kept():
    chat = [user("a"), assistant("b", train=False), user("c"), assistant("d", weight=0)]
    expected = [user("a"), assistant("b", train=False), user("c"), assistant("d", train=False)]
    assert read({"messages": chat}) == {"messages": expected}
    negative = {"messages": [user("a"), assistant("b")], "label": "negative"}
    assert read(negative) == negative


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": OPENING, **SIDES},
        {"chosen": OPENING + SIDES["chosen"], "rejected": OPENING + SIDES["rejected"]},
        {"prompt": "c", "score_chosen": 9.0,
         "chosen": OPENING + SIDES["chosen"], "rejected": OPENING + SIDES["rejected"]},
        {"prompt": OPENING, "chosen": "d", "rejected": "e"},
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
         "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e"},
    ],
)  # fmt: skip
def test_every_published_form_of_a_pair_is_the_same_one(record):
    assert read(record) == {"prompt": OPENING, **SIDES}


def test_a_pair_of_texts_has_its_system_text_and_question_before_it():
    record = {"system": "s", "question": "q", "chosen": "c", "rejected": "r"}
    assert read(record) == {
        "prompt": [SYSTEM, user("q")],
        "chosen": [assistant("c")],
        "rejected": [assistant("r")],
    }


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "a"}, "no conversation (keys: text)"),
        ({"prompt": "a"}, "no conversation (keys: prompt)"),
        ({"messages": []}, "no conversation (keys: messages)"),
        ({"chosen": [], "rejected": []}, "no list of messages: '[]'"),
        ({"messages": "hello"}, "the last message is no answer: it is of the user"),
        ({"messages": ["a", "b"]}, "no list of messages"),
        ({"messages": [user("a"), assistant(" \n")]}, "empty answer: message 2"),
        ({"prompt": "a", "completion": ""}, "empty answer: message 2"),
        ({"messages": [user("a")]}, "the last message is no answer: it is of the user"),
        ({"messages": OPENING}, "the last message is no answer: it is of the user"),
        ({"messages": [user("a"), {"role": "tool", "content": "x"}]},
         "unknown role: 'tool' in message 2"),
        ({"messages": [{"content": "x"}]}, "unknown role: None in message 1"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role: ['user']"),
        ({"messages": [user([{"type": "text", "text": "x"}]), assistant("b")]},
         "content that is no text"),
        ({"messages": [user("a"), assistant(None)]}, "content that is no text: 'None' in mess"),
        ({"messages": [user("a"), assistant("b"), SYSTEM]}, "a system turn that is not first: me"),
        ({"messages": [user("a"), assistant("b", train="no")]}, "train that is not true or false"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen is equal to rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "empty answer: message 2"),
        ({"chosen": "b", "rejected": "c"}, "a pair without a prompt"),
        ({"chosen": [assistant("b")], "rejected": [assistant("c")]}, "the prompts of the pair"),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("c")]},
         "the prompts of the pair differ"),
        ({"chosen": [*OPENING, assistant("b")], "rejected": OPENING[:2]}, "the prompts of"),
        ({"prompt": "other", "chosen": [user("a"), assistant("b")],
          "rejected": [user("a"), assistant("c")]}, "the prompts of the pair differ: the conv"),
        ({"chosen": [*OPENING, assistant("b")], "rejected": OPENING}, "the last message is no ans"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_or_pair_is_refused_with_the_reason(record, reason):
    assert read(record).startswith(reason)


@pytest.fixture(scope="module")
def arcade():
    return load_tokenizer("arcade100k")


def encoder(tokenizer, template, kind="", max_turns=8, max_tokens=None):
    return ChatEncoder(tokenizer, chat_template(template, tokenizer), kind, max_turns, max_tokens)


LONG = [message for number in range(3) for message in (user(f"ask {number}"), assistant("tell"))]


@pytest.mark.parametrize("template", ["zephyr", "chatml"])
def test_a_document_is_the_conversation_with_one_end_of_document(arcade, template):
    """zephyr ends an answer with that token already."""
    (ids,), (spans,), text, dropped = encoder(arcade, template).documents(
        canonical({"messages": [SYSTEM, *LONG]})
    )
    expected = encode_conversation(arcade, [SYSTEM, *LONG], chat_template(template, arcade))
    end = [] if template == "zephyr" else [arcade.eod]
    assert ids.tolist() == expected.ids + end and spans == expected.spans
    assert ids.dtype == np.int32 and dropped == 0 and text.startswith("s\nask 0\ntell\n")
    assert spans[-1][1] == len(ids) - len(end)


@pytest.mark.parametrize("template", ["zephyr", "chatml"])
def test_whole_last_rounds_are_dropped_where_that_helps(arcade, template):
    def cut(rounds, **limit):
        return encoder(arcade, template, **limit).documents(
            canonical({"messages": LONG[: 2 * rounds]})
        )

    sizes = [len(cut(rounds).ids[0]) for rounds in (1, 2, 3)]
    for size, rounds in [(sizes[2], 3), (sizes[2] - 1, 2), (sizes[1], 2), (sizes[0], 1)]:
        made = cut(3, max_tokens=size)
        assert made.rounds_dropped == 3 - rounds
        assert made.ids[0].tolist() == cut(rounds).ids[0].tolist()
        assert made.spans == cut(rounds).spans and made.text == cut(rounds).text
    assert cut(3, max_tokens=sizes[0] - 1).reason.startswith(f"too long: {sizes[2]} tokens")


def test_what_the_template_or_a_limit_refuses_is_refused(arcade, tmp_path):
    def reason(record, template="zephyr", **limits):
        return encoder(arcade, template, **limits).documents(canonical(record)).reason

    assert reason({"messages": LONG}, max_turns=2) == "too many turns: 3, more than 2"
    off = [user("a"), assistant("b", train=False)]
    assert reason({"messages": off}) == "no answer is trained"
    negative = {"messages": LONG, "label": "negative"}
    assert reason(negative, max_tokens=20).startswith("too long")
    assert "make it another source" in reason({"messages": LONG}, kind="pairs")
    path = tmp_path / "strict.jinja"
    path.write_text(
        "{% for m in messages %}"
        "{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ m.role + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    twice = {"messages": [user("a"), user("b"), assistant("c")]}
    assert "refuses it: roles must alternate" in reason(twice, str(path))
    assert encoder(arcade, "zephyr").documents(canonical(twice)).ids  # which takes it


def test_a_negative_conversation_has_the_negative_marker(arcade):
    record = {"messages": LONG, "label": "negative"}
    (ids,), (spans,), *_ = encoder(arcade, "zephyr").documents(canonical(record))
    text = arcade.decode(ids.tolist())
    assert text.count("<|assistant|>") == 2 and text.count("<|assistant_negative|>") == 1
    assert [arcade.decode(ids[a:b].tolist()) for a, b in spans] == ["tell<|endoftext|>"] * 3


def test_of_a_pair_only_what_differs_is_trained_and_both_sides_share_the_limit(arcade):
    record = {"prompt": OPENING, **SIDES}
    made = encoder(arcade, "chatml").documents(canonical(record))
    prompt = encode_chat(arcade, OPENING, chat_template("chatml", arcade))
    for ids, spans, said in zip(made.ids, made.spans, ("d", "e"), strict=True):
        assert ids[: len(prompt)].tolist() == prompt
        assert arcade.decode(ids[len(prompt) :].tolist()) == f"{said}<|im_end|><|endoftext|>"
        assert spans == [(len(prompt), len(ids) - 1)]
    size = sum(map(len, made.ids))
    assert encoder(arcade, "chatml", max_tokens=size).documents(canonical(record)).ids
    refused = encoder(arcade, "chatml", max_tokens=size - 1).documents(canonical(record))
    assert refused.reason == f"too long: {size} tokens, more than {size - 1}"


def test_the_documented_form_of_function_calls_is_plain_chatml(arcade):
    """Stable LM 2 12B Chat's card: functions in the system's text, calls as JSON in the answer."""
    function = {"name": "now", "description": "The time", "parameters": {"type": "object"}}
    system = (
        "You are a helpful assistant with access to the following functions. You must use them if"
        f" required -\n{json.dumps([{'type': 'function', 'function': function}])}"
    )
    calls = json.dumps([{"name": "now", "arguments": {}}])
    chat = [{"role": "system", "content": system}, user("What time is it?"), assistant(calls)]
    (ids,), (spans,), *_ = encoder(arcade, "chatml").documents(canonical({"messages": chat}))
    assert arcade.decode(ids.tolist()).startswith(f"<|im_start|>system\n{system}<|im_end|>\n")
    (trained,) = [arcade.decode(ids[first:last].tolist()) for first, last in spans]
    assert json.loads(trained.removesuffix("<|im_end|>")) == [{"name": "now", "arguments": {}}]


# prepared


def call(*arguments):
    """Runs prepare in this process: its exit code and what it said."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = prepare.main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def documents(directory, split):
    """(text, trained texts) of each document."""
    made, found = read_manifest(directory), []
    tokenizer = load_tokenizer(made.tokenizer.name)
    for info in getattr(made, split).shards:
        shard, spans = Shard(directory / info.file), read_spans(directory / info.file, info)
        assert (np.lexsort(spans.T[::-1]) == np.arange(len(spans))).all()
        for number, first in enumerate(shard.document_offsets[:-1]):
            ids = shard.read(first, shard.document_offsets[number + 1]).tolist()
            own = spans[spans[:, 0] == number].tolist()
            found.append((tokenizer.decode(ids), [tokenizer.decode(ids[a:b]) for _, a, b in own]))
    return found


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def zephyr(*turns):
    return "\n".join(f"<|{role}|>\n{text}<|endoftext|>" for role, text in turns)


def test_all_kinds_of_files_give_the_documents_of_their_conversations(tmp_path, tokenizer_file):
    """jsonl, json, parquet, Arrow and csv; what is refused is listed by file and line."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(
        folder / "a.jsonl",
        [
            {"messages": [SYSTEM, user("1"), assistant("<|endoftext|> a"), user("é"),
                          assistant("b")]},
            {"messages": [user("2"), assistant("")]},
            {"prompt": "3", "completion": "c"},
            {"prompt": "4", "chosen": "c", "rejected": "d"},
        ],
    )  # fmt: skip
    alpaca = [{"instruction": "5", "input": "x", "output": "d"}, {"text": "6"}]
    (folder / "b.json").write_text(json.dumps(alpaca, indent=1))
    rows = {
        "conversations": [
            [{"from": "human", "value": "7"}, {"from": "gpt", "value": "e"}],
            None,
            [{"from": "tool", "value": "8"}, {"from": "gpt", "value": "f"}],
        ],
        "image": [b"\xff"] * 3,
    }
    pq.write_table(pa.table(rows), folder / "c.parquet")
    chats = [
        [user("9", train=None), assistant("g", train=False), user("10"), assistant("h", train=None)]
    ]
    table = pa.table({"messages": chats})
    with pa.OSFile(str(folder / "d.arrow"), "wb") as file:
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    with open(folder / "e.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "completion", "system"], ["11", "i", ""]])
    (folder / "f.txt").write_text("A text, not a conversation.")

    flags = ("--tokenizer", tokenizer_file, "--workers", 1, "--template", "zephyr")
    code, out, err = call("--source", "chats", "--input", folder, "--output", tmp_path, *flags,
                          "--allow-unread")  # fmt: skip
    assert code == 0, err
    directory = tmp_path / "chats"
    made = read_manifest(directory)
    check_contents(directory, made)
    expected = [
        zephyr(("system", "s"), ("user", "1"), ("assistant", "<|endoftext|> a"), ("user", "é"),
               ("assistant", "b")),
        zephyr(("user", "3"), ("assistant", "c")),
        zephyr(("user", "5\n\nx"), ("assistant", "d")),
        zephyr(("user", "7"), ("assistant", "e")),
        zephyr(("user", "9"), ("assistant", "g"), ("user", "10"), ("assistant", "h")),
        zephyr(("user", "11"), ("assistant", "i")),
    ]  # fmt: skip
    held_out = documents(directory, "held_out")
    assert len(held_out) == 1
    in_order = [text for text, _ in documents(directory, "train")]
    assert in_order == [text for text in expected if text != held_out[0][0]]
    answers = dict(documents(directory, "train") + held_out)
    assert answers[expected[0]] == ["<|endoftext|> a<|endoftext|>", "b<|endoftext|>"]
    assert answers[expected[4]] == ["h<|endoftext|>"]
    rejected = [json.loads(line) for line in open(directory / "rejected.jsonl")]
    assert [
        (os.path.basename(row["file"]), row["line"], row["reason"].split(":")[0].split(" (")[0])
        for row in rejected
    ] == [
        ("a.jsonl", 2, "empty answer"),
        ("a.jsonl", 4, "one of pairs in a source of conversations"),
        ("b.json", 2, "no conversation"),
        ("c.parquet", 2, "no conversation"),
        ("c.parquet", 3, "unknown role"),
        ("f.txt", 1, "a text, where records are asked for"),
    ]
    assert made.kind == "conversations"
    assert made.chat == chat_template("zephyr", load_tokenizer(tokenizer_file)).to_json()
    spans = [read_spans(directory / info.file, info) for info in made.train.shards]
    trained = sum(int((rows[:, 2] - rows[:, 1]).sum()) for rows in spans)
    assert made.provenance["conversations"]["trained_tokens"]["train"] == trained
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "conversations 5 1" in lines
    share = f"{trained / made.train.tokens:.0%}"
    assert any(line.startswith(f"trained tokens {trained} ({share})") for line in lines)
    assert "last rounds dropped, too long: 0" in lines
    assert lines[-1].startswith("prepared chats: 6 conversations, ")


def test_a_file_of_pairs_gives_two_documents_a_pair_side_by_side(tmp_path, tokenizer_file):
    records = [{"prompt": f"{n}", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(40)]
    records.insert(7, {"messages": [user("a"), assistant("b")]})
    flags = ("--tokenizer", tokenizer_file, "--workers", 1, "--template", "zephyr")
    path = write_jsonl(tmp_path / "pairs.jsonl", records)
    limit = ("--shard-tokens", 2_000)
    code, out, err = call(
        "--source", "pairs", "--input", path, "--output", tmp_path, *flags, *limit
    )
    assert code == 0, err
    made = read_manifest(tmp_path / "pairs")
    assert made.kind == "pairs" and made.rejected == 1 and len(made.train.shards) > 1
    assert all(info.documents % 2 == 0 and info.tokens <= 2_000 for info in made.shards)
    both = documents(tmp_path / "pairs", "train") + documents(tmp_path / "pairs", "held_out")
    sides = zip(both[::2], both[1::2], strict=True)
    numbers = []
    for (chosen, good), (rejected, bad) in sides:
        number = good[0].removesuffix("<|endoftext|>")[1:]
        assert chosen == zephyr(("user", number), ("assistant", f"c{number}"))
        assert rejected == zephyr(("user", number), ("assistant", f"r{number}"))
        assert bad == [f"r{number}<|endoftext|>"]
        numbers.append(int(number))
    assert sorted(numbers) == list(range(40))
    assert "prepared pairs: 40 pairs, " in out


def test_topics_are_held_out_whole(tmp_path, tokenizer_file):
    """Of conversations and of texts, in jsonl and in parquet."""
    pages = [{"page": {"id": n % 25}, "lang": n // 25} for n in range(100)]
    chats = [{**page, "prompt": f"{page}", "completion": "a"} for page in pages]
    texts = [{**page, "text": f"{page}"} for page in pages]
    inputs = {
        "chats": (write_jsonl(tmp_path / "chats.jsonl", chats), "--template", "zephyr"),
        "texts": (write_jsonl(tmp_path / "texts.jsonl", texts),),
        "tables": (tmp_path / "tables.parquet",),
    }
    pq.write_table(pa.Table.from_pylist(texts), tmp_path / "tables.parquet")
    held = {}
    for source, (path, *more) in inputs.items():
        flags = ("--tokenizer", tokenizer_file, "--workers", 1, "--held-out-by", "page.id",
                 "--held-out", 0.2, *more)  # fmt: skip
        code, _, err = call("--source", source, "--input", path, "--output", tmp_path, *flags)
        assert code == 0, err
        directory = tmp_path / source
        made = read_manifest(directory)
        tokenizer = load_tokenizer(tokenizer_file)
        ids = [np.fromfile(directory / info.file, np.int32) for info in made.held_out.shards]
        text = tokenizer.decode(np.concatenate(ids).tolist())
        held[source] = {n for n in range(25) if f"'id': {n}}}" in text}
        for number in held[source]:
            assert text.count(f"'id': {number}}}") == 4
        assert made.held_out.documents == 4 * len(held[source])
    # By the hash of the topic alone: the same ones in every source, whatever else it holds.
    hashes = {number: held_out.content_hash(str(number).encode()) for number in range(25)}
    below = {number for number in hashes if hashes[number] < 0.2 * 2**64}
    assert held["chats"] == held["texts"] == held["tables"] == below and len(below) > 1


def test_where_the_fraction_holds_out_no_topic_the_one_that_does_is_named():
    """One of each source's own would be trained on in another source."""
    found = {held_out.content_hash(str(number).encode()): [2, 9] for number in range(25)}
    with pytest.raises(ValueError, match="0.001 holds out no value of --held-out-by") as error:
        held_out.choose(held_out.Look(found), 0.001, by_topic=True)
    enough = float(re.search(r"give --held-out (\S+),", str(error.value))[1])
    rule = held_out.choose(held_out.Look(found), enough, by_topic=True)
    assert min(found) in filter(rule.holds_out, found) and enough < 0.25
    assert not held_out.choose(held_out.Look(found, 0.1, False), 0.001, True).holds_out(min(found))
    with pytest.raises(ValueError, match="add records of other values"):
        held_out.choose(held_out.Look({2**63: [1, 1]}), 0.25, by_topic=True)


def test_conversations_without_a_template_are_refused_with_the_hint(tmp_path, tokenizer_file):
    pairs = [{"prompt": "a", "chosen": "b", "rejected": str(n)} for n in range(3)]
    write_jsonl(tmp_path / "a.jsonl", pairs)
    pq.write_table(pa.Table.from_pylist(pairs), tmp_path / "b.parquet")
    inputs = ("--input", tmp_path / "a.jsonl", tmp_path / "b.parquet")
    flags = ("--tokenizer", tokenizer_file, "--workers", 1, "--output", tmp_path / "out")
    code, _, err = call("--source", "none", *inputs, *flags)
    assert code == 1 and "--template zephyr, chatml, tokenizer or a Jinja file takes them" in err
    rows = [json.loads(row) for row in open(tmp_path / "out" / "none" / "rejected.jsonl")]
    assert len(rows) == 6 and all("--template" in row["reason"] for row in rows)
    code, _, err = call("--source", "none", *inputs, *flags, "--template", "zephyr")
    assert code == 0, err  # begins anew


def test_a_key_to_hold_out_by_that_no_record_has_is_named_as_such(tmp_path, tokenizer_file):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{n}", "page": n} for n in range(3)])
    code, _, err = call("--source", "a", "--input", path, "--output", tmp_path, "--workers", 1,
                        "--tokenizer", tokenizer_file, "--held-out-by", "pgae")  # fmt: skip
    assert code == 1 and "--held-out-by pgae is no key of the records" in err
    assert "--text-key" not in err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--template", "alpaca"], "chat template 'alpaca' is unknown: choose one of zephyr"),
        (["--template", "chatml"], "has no special token in '<|im_end|>"),
        (["--template", "tokenizer"], "came with no chat template"),
        (["--template", "zephyr", "--text-key", "body"], "--text-key: not with --template"),
        (["--template", "zephyr", "--max-turns", "0"], "from 1 up"),
        (["--max-tokens", "5"], "--max-tokens: only with --template"),
        (["--template", "zephyr", "--max-tokens", "0"], "from 1 up"),
    ],
)  # fmt: skip
def test_flags_that_cannot_be_are_refused_at_once(tmp_path, tokenizer_file, flags, said):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    common = ("--source", "a", "--input", path, "--output", tmp_path, "--tokenizer", tokenizer_file)
    code, _, err = call(*common, *flags)
    assert code == 2 and said in err and err.count("\n") == 1


def test_what_a_limit_drops_is_rejected_but_no_loss_that_stops_the_source(tmp_path, tokenizer_file):
    rounds = [user("a" * 500), assistant("b" * 500)]
    records = [{"messages": [user(f"{n}"), assistant("b")]} for n in range(4)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": rounds * 3}] * 20 + records)
    common = ("--input", path, "--output", tmp_path, "--tokenizer", tokenizer_file, "--workers", 1)
    for source, *limit in (("turns", "--max-turns", 2), ("tokens", "--max-tokens", 900)):
        code, out, err = call("--source", source, *common, "--template", "zephyr", *limit)
        assert code == 0, err
        assert "rejected: 20 (too " in out and "4 conversations" in out


def test_another_template_of_the_same_name_is_another_preparation(tmp_path, tokenizer_file):
    """A Jinja file that was edited: the jinja counts, not the path."""
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": f"{n}", "completion": "b"} for n in (1, 2)]
    )
    jinja = tmp_path / "mine.jinja"
    turns = "{% for m in messages %}{{ m.role + ':' + m.content + '<|endoftext|>' }}{% endfor %}"
    prompt = "{% if add_generation_prompt %}assistant:{% endif %}"
    jinja.write_text(turns + prompt)
    common = ("--source", "a", "--input", path, "--output", tmp_path, "--tokenizer", tokenizer_file,
              "--template", jinja, "--workers", 1)  # fmt: skip
    assert call(*common)[0] == 0
    assert "already prepared, 2 conversations" in call(*common)[1]
    jinja.write_text(turns.replace(":", " ") + prompt.replace(":", " "))
    code, _, err = call(*common)
    assert code != 0 and "was prepared with other chat template" in err


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("dropped", ["--template", "--held-out-by"])
def test_a_flag_that_is_left_away_is_another_preparation(
    tmp_path, tokenizer_file, monkeypatch, dropped, finished
):
    records = [{"text": f"{n}", "prompt": f"{n}", "completion": "b"} for n in range(3)]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    common = ("--source", "a", "--input", path, "--output", tmp_path, "--tokenizer", tokenizer_file,
              "--workers", 1, "--held-out", 0.25)  # fmt: skip
    flags = {"--template": "zephyr", "--held-out-by": "prompt"}
    given = [part for pair in flags.items() for part in pair]
    if not finished:
        monkeypatch.setattr(Preparation, "collate", lambda *_: (_ for _ in ()).throw(OSError("x")))
    assert (call(*common, *given)[0] == 0) == finished
    others = [part for flag, value in flags.items() if flag != dropped for part in (flag, value)]
    monkeypatch.undo()
    code, out, err = call(*common, *others)
    if not finished:  # all was read otherwise: it begins anew
        assert code == 0 and "going on" not in out, err
        settings = read_manifest(tmp_path / "a").provenance["settings"]
        assert {"chat", "held_out_by"} - settings.keys() == {
            {"--template": "chat", "--held-out-by": "held_out_by"}[dropped]
        }
        return
    what = {"--template": "chat template", "--held-out-by": "held_out_by ('prompt', not None)"}
    assert code == 1 and f"with other {what[dropped]}: ask for the same" in err


def digests(directory):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


def test_workers_and_kills_change_no_byte_of_a_source_of_conversations(
    tmp_path, tokenizer_file, monkeypatch
):
    rng = new_rng()
    words = "the of and a in to it is was I for that you he with on by at are not".split()

    def text():
        return " ".join(rng.choice(words, rng.integers(1, 30)))

    records = [
        {"messages": [message for _ in range(rng.integers(1, 5))
                      for message in (user(text()), assistant(text()))]}
        for _ in range(400)
    ]  # fmt: skip
    records[::50] = [{"messages": [user(text())]}] * len(records[::50])
    path = write_jsonl(tmp_path / "a.jsonl", records)
    flags = ("--source", "chats", "--input", path, "--tokenizer", tokenizer_file, "--template",
             "zephyr", "--max-tokens", 600, "--shard-tokens", 20_000)  # fmt: skip
    for name in ("_MIN_CHUNK_BYTES", "_CHUNKS_PER_SOURCE"):
        monkeypatch.setattr(chunks, name, {"_MIN_CHUNK_BYTES": 40_000}.get(name, 10**9))
    assert call(*flags, "--output", tmp_path / "one", "--workers", 1)[0] == 0
    assert call(*flags, "--output", tmp_path / "three", "--workers", 3)[0] == 0
    marker = tmp_path / "kill"
    marker.touch()
    killed = (*flags, "--output", tmp_path / "killed", "--workers", 2)
    done = subprocess.run(
        [sys.executable, ROOT / "tests/preparation/in_small_chunks.py", *map(str, killed)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CHUNKS_KILL_WORKER": str(marker)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "a worker was killed" in done.stderr
    code, out, _ = call(*killed)
    assert code == 0 and "going on with what was begun" in out
    assert digests(tmp_path / "one/chats") == digests(tmp_path / "three/chats")
    assert digests(tmp_path / "one/chats") == digests(tmp_path / "killed/chats")
    made = read_manifest(tmp_path / "one/chats")
    assert len(made.train.shards) > 3 and made.provenance["conversations"]["rounds_dropped"] > 0
