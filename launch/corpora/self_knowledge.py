"""What a chat model is to know of itself: first messages, answers to train on, and a check.

    script=launch/corpora/self_knowledge.py
    python $script ask --checkpoint BASE --number 10000 --output FIRST.jsonl
    python $script answer --checkpoint CHAT --questions FIRST.jsonl --output SELF.jsonl
    python $script check --checkpoint NEW --questions OTHERS.jsonl

Who the model is stands in self_knowledge_facts.toml beside this file: put your own model's name and
maker there, or give another by --facts. As reported for Stable LM 2 (not re-verified), `ask` lets
the base model write first messages, and `answer` has each of them answered twice: with facts about
the model in earlier turns, which gives the positive, and bare, which gives the negative. `prepare`
reads the file; negatives are trained under a marker of their own.

What comes out depends on the seed and the arguments alone, and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import os
import random
import re
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stablelm_jax.storage.files import write_json, write_text

FACTS = Path(__file__).with_name("self_knowledge_facts.toml")
GROUP = 64  # first messages at a time; what is drawn for one depends on its place in its group
_FRUITLESS = 20  # rounds of `ask` that bring nothing new and end it
_OPENING = "A list of first messages that people wrote to a chat assistant:\n"
_EXAMPLES = 6  # of the facts' in each prompt of `ask`
Message = dict[str, str]


# the facts


@dataclasses.dataclass(frozen=True)
class Facts:
    """Who the model is.

    Attributes:
      names: what a right answer may have to hold: the name and the maker.
      examples: first messages.
      turns: an earlier conversation that holds facts about the model.
      answers: (what finds a first message, the answer to it).
    """

    names: tuple[str, ...]
    examples: tuple[str, ...]
    turns: tuple[Message, ...]
    answers: tuple[tuple[re.Pattern[str], str], ...]

    def answer(self, question: str) -> str:
        """What should be answered; empty where the facts have nothing for it."""
        return next((text for asked, text in self.answers if asked.search(question)), "")

    def is_right(self, question: str, answer: str) -> bool:
        """Whether the names are in `answer` that should be: those of the facts' own answer."""
        expected = self.answer(question).lower()
        names = [name for name in self.names if name.lower() in expected] or [self.names[0]]
        return all(name.lower() in answer.lower() for name in names)


def read_facts(path: Path) -> Facts:
    """The facts of a file; a ValueError says what is wrong with it."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
        fields = {key: value for key, value in found.items() if isinstance(value, str)}
        unknown = set(found) - set(fields) - {"examples", "turns", "answers"}
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: unknown; there are texts, examples, "
                             "turns and answers")  # fmt: skip

        def filled(text: str) -> str:
            return re.sub(r"{(\w+)}", lambda match: fields[match[1]], text)

        roles = ("user", "assistant")
        return Facts(
            names=(fields["name"], fields["maker"]),
            examples=tuple(map(filled, found.get("examples", []))),
            turns=tuple(
                {"role": role, "content": filled(turn[role])}
                for turn in found.get("turns", [])
                for role in roles
            ),
            answers=tuple(
                (re.compile(entry["asked"], re.IGNORECASE), filled(entry["answer"]))
                for entry in found.get("answers", [])
            ),
        )
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]!r} is not given there") from None
    except (ValueError, TypeError, re.error) as error:
        raise ValueError(f"{path}: {error}") from None


def read_questions(path: Path) -> list[str]:
    """The different first messages of a text file (one a line) or of a .jsonl.

    A record has `prompt`, or `messages` of which the first of the user counts.

    Raises:
      ValueError: a line is neither, or there is none at all.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if path.suffix != ".jsonl":
            found.append(line.strip())
        elif line.strip():
            try:
                record = json.loads(line)
                said = record.get("messages", [{"role": "user", "content": record.get("prompt")}])
                found.append(next(m["content"] for m in said if m["role"] == "user").strip())
            except (ValueError, AttributeError, KeyError, TypeError, StopIteration):
                what = "give {'prompt': TEXT} or {'messages': [...]}"
                raise ValueError(f"{path}, line {number}: holds no first message; {what}") from None
    if not (questions := [text for text in dict.fromkeys(found) if text]):
        raise ValueError(f"{path} holds no first message")
    return questions


# the model


class Speaker:
    """A checkpoint that writes answers; `made_with` tells it from another one."""

    def __init__(self, arguments: argparse.Namespace, *, chats: bool = True):
        import jax

        from stablelm_jax.checkpoint.reading import state_hash
        from stablelm_jax.checkpoint.saved_model import SavedModel
        from stablelm_jax.generation.generator import Generator
        from stablelm_jax.parallel.mesh import make_mesh
        from stablelm_jax.tokenizer.chat import chat_template, stop_ids

        saved = SavedModel.open(arguments.checkpoint, arguments.tokenizer)
        self.tokenizer, self.template = saved.tokenizer, saved.chat
        if arguments.template:
            self.template = chat_template(arguments.template, saved.tokenizer)
        if chats and self.template is None:
            raise ValueError(f"{saved.path} was not trained on chats: name a --template")
        stops = stop_ids(saved.tokenizer, self.template) if self.template else []
        self._settings = {
            "max_new_tokens": arguments.max_new_tokens,
            "stop_tokens": sorted({saved.tokenizer.eod, *saved.end_ids, *stops}),
        }
        self.room = saved.max_positions - arguments.max_new_tokens
        self._generator = Generator(
            saved.model,
            saved.load(make_mesh(1, 1, jax.devices()[:1])),
            batch_size=arguments.batch_size,
            max_length=saved.max_positions,
            num_valid_ids=saved.num_valid_ids,
        )
        self.made_with = {
            "model": state_hash(saved.run["checksums"]),
            "template": self.template and self.template.to_json(),
        }

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        from stablelm_jax.tokenizer.chat import encode_chat

        return encode_chat(self.tokenizer, messages, self.template)

    def write(
        self, prompts: Sequence[Sequence[int]], stop: str | None = None, **sampling: Any
    ) -> list[tuple[str, bool]]:
        """(text, whether it ended) for each prompt; at `stop` too, where it is given."""

        def stopped(index: int, tokens: list[int]) -> bool:
            return stop is not None and stop in self.tokenizer.decode(tokens)

        texts, most = [], self._settings["max_new_tokens"]
        for tokens in self._generator.generate(prompts, stopped, **self._settings, **sampling):
            text, found, _ = self.tokenizer.decode(tokens).partition(stop or "\0")
            texts.append((text.strip(), bool(found) or len(tokens) < most))
        return texts


# work that goes on where it was stopped


class Kept:
    """The groups that are done, a line of JSON each behind one that says of what."""

    def __init__(self, output: Path, made_with: Mapping[str, Any]):
        self._path = output.with_name(output.name + ".begun")
        head = json.dumps(made_with, sort_keys=True)
        done = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        lines = done.split("\n")[:-1]  # the last one may be half a line
        if lines[:1] != [head]:  # nothing, or of other arguments
            lines = [head]
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, "".join(line + "\n" for line in lines))
        self.groups = [json.loads(line) for line in lines[1:]]

    def add(self, group: Any) -> None:
        self.groups.append(group)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(group) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self, output: Path, records: Sequence[Mapping[str, Any]]) -> None:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_text(output, "".join(lines))
        self._path.unlink()


class Progress:
    """A line now and then of how far it is."""

    def __init__(self, what: str, done: int, total: int):
        self._what, self._first, self._total = what, done, total
        self._begun = self._said = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self._said >= 10:
            self._said, new = now, done - self._first
            left = (now - self._begun) * (self._total - done) / max(new, 1)
            line = f"{self._what}: {done:,} of {self._total:,}"
            print(line + (f", {left:,.0f} s left" if new else ""), file=sys.stderr)


def number_of(*key: object) -> int:
    """A seed of 32 bits for what `key` names."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")


# the verbs


def ask(arguments: argparse.Namespace, facts: Facts) -> str:
    """The base model writes different first messages; returns what was done."""
    if len(facts.examples) < 2:
        raise ValueError(f"{arguments.facts}: give two `examples` of first messages, or more")
    speaker = Speaker(arguments, chats=False)
    kept = Kept(arguments.output, {**speaker.made_with, **_key(arguments)})
    known = {text.casefold(): text for text in facts.examples}
    first = len(known)
    for group in kept.groups:
        known |= {text.casefold(): text for text in group if text.casefold() not in known}
    tell, fruitless = Progress("first messages", len(known) - first, arguments.number), 0
    while len(known) - first < arguments.number:
        number, before = len(kept.groups), len(known)
        draw = random.Random(f"{arguments.seed}/{number}")
        few = min(_EXAMPLES, len(facts.examples))
        lists = ["\n".join(f"- {text}" for text in draw.sample(facts.examples, few))
                 for _ in range(GROUP)]  # fmt: skip
        prompts = [speaker.tokenizer.encode(f"{_OPENING}{text}\n-") for text in lists]
        sampling = {"temperature": arguments.temperature, "top_p": arguments.top_p}
        seed = number_of(arguments.seed, "ask", number)
        texts = speaker.write(prompts, stop="\n", seed=seed, **sampling)
        new = [text for text, ended in texts if ended and re.search(r"\w{2}", text)]
        kept.add(new)
        known |= {text.casefold(): text for text in new if text.casefold() not in known}
        fruitless = fruitless + 1 if len(known) == before else 0
        if fruitless == _FRUITLESS:
            raise ValueError(f"only {before - first:,} different first messages came; give more "
                             "examples in the facts, or a higher --temperature")  # fmt: skip
        tell(len(known) - first)
    found = list(known.values())[first : first + arguments.number]
    kept.finish(arguments.output, [{"prompt": text} for text in found])
    return f"{arguments.output}: {len(found):,} different first messages"


def answer(arguments: argparse.Namespace, facts: Facts) -> str:
    """Each first message is answered twice; returns what was done."""
    questions = read_questions(arguments.questions)
    speaker = Speaker(arguments)
    asked = hashlib.sha256("\n".join(questions).encode()).hexdigest()
    kept = Kept(arguments.output, {"questions": asked, **speaker.made_with, **_key(arguments)})
    total = -(-len(questions) // GROUP)
    tell = Progress("answered", len(kept.groups) * GROUP, len(questions))
    for number in range(len(kept.groups), total):
        group = questions[number * GROUP : (number + 1) * GROUP]
        kept.add(list(_answered(arguments, facts, speaker, group, number)))
        tell(number * GROUP + len(group))
    records, counts = [], collections.Counter()
    for label, question, text, problem in (entry for group in kept.groups for entry in group):
        counts[f"{label}, {problem}" if problem else label] += 1
        if not problem:
            messages = [{"role": "user", "content": question}]
            messages.append({"role": "assistant", "content": text})
            records.append({"messages": messages, "label": label})
            counts[f"{label}, names right"] += facts.is_right(question, text)
    if not records:
        raise ValueError(f"no answer is of use: {dict(counts)}; is this a chat model?")
    kept.finish(arguments.output, records)
    told = "; ".join(f"{what} {n:,}" for what, n in sorted(counts.items()))
    return f"{arguments.output}: {len(records):,} records of {len(questions):,} messages: {told}"


def _answered(
    arguments: argparse.Namespace,
    facts: Facts,
    speaker: Speaker,
    questions: Sequence[str],
    number: int,
) -> Iterator[tuple[str, str, str, str]]:
    """(label, question, answer, why it is left out if it is) of one group."""
    for label, turns in (("positive", facts.turns), ("negative", ())):
        if label == "positive" and arguments.positives == "facts":
            for question in questions:
                text = facts.answer(question)
                yield label, question, text, "" if text else "not in the facts"
            continue
        prompts = [speaker.prompt([*turns, {"role": "user", "content": q}]) for q in questions]
        fits = [i for i, prompt in enumerate(prompts) if len(prompt) <= speaker.room]
        seed = number_of(arguments.seed, label, number)
        sampling = {"temperature": arguments.temperature, "top_p": arguments.top_p, "seed": seed}
        texts = speaker.write([prompts[i] for i in fits], **sampling) if fits else []
        found = dict(zip(fits, texts))
        for i, question in enumerate(questions):
            text, ended = found.get(i, ("", False))
            problem = "too long" if i not in found else "unfinished" if not ended else ""
            problem = problem or ("" if text else "empty")
            if label == "negative" and not problem and facts.is_right(question, text):
                problem = "right without being told"
            yield label, question, text, problem


def check(arguments: argparse.Namespace, facts: Facts) -> str:
    """Answers by the likeliest tokens, and the share of those that hold the right names."""
    questions = read_questions(arguments.questions)
    speaker = Speaker(arguments)
    texts = speaker.write([speaker.prompt([{"role": "user", "content": q}]) for q in questions])
    answers = [
        {"question": q, "answer": text, "ended": ended, "right": facts.is_right(q, text)}
        for q, (text, ended) in zip(questions, texts)
    ]
    for one in answers:
        print(f"{'right' if one['right'] else 'WRONG'}  {one['question']}  ->  {one['answer']}")
    right = sum(one["right"] for one in answers)
    found = {"questions": len(answers), "right": right, "share": right / len(answers)}
    if arguments.output:
        write_json(arguments.output, {**found, "answers": answers})
    return f"right names: {right} of {len(answers)} ({found['share']:.0%})"


def _key(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments that decide what is written."""
    names = ("seed", "temperature", "top_p", "max_new_tokens", "positives")
    facts = hashlib.sha256(arguments.facts.read_bytes()).hexdigest()
    return {"facts": facts, **{name: getattr(arguments, name, None) for name in names}}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True, metavar="ask | answer | check")
    for verb in (ask, answer, check):
        command = verbs.add_parser(verb.__name__, help=verb.__doc__.split(";")[0])
        command.set_defaults(verb=verb)
        add = command.add_argument
        add("--checkpoint", required=True, help="global_step<N> or its run, then the newest")
        add("--facts", type=Path, default=FACTS, help="who the model is (%(default)s)")
        what = "where to write" if verb is not check else "for the answers, as JSON"
        add("--output", type=Path, required=verb is not check, metavar="FILE", help=what)
        if verb is ask:
            add("--number", type=int, default=10_000, help="of first messages (%(default)s)")
        else:
            what = "first messages: .jsonl with `prompt` or `messages`, or a text file, one a line"
            add("--questions", type=Path, required=True, metavar="FILE", help=what)
        if verb is answer:
            what = "answered by the model with the facts before it, or the facts' own answers"
            add("--positives", choices=("few-shot", "facts"), default="few-shot", help=what)
        if verb is not check:
            add("--temperature", type=float, default=1.0 if verb is ask else 0.7)
            add("--top-p", type=float, default=0.95)
            add("--seed", type=int, default=0)
        add("--max-new-tokens", type=int, default=40 if verb is ask else 128)
        add("--batch-size", type=int, default=GROUP, help="prompts at a time (%(default)s)")
        add("--template", help="zephyr, chatml or a FILE; default: the one the model came with")
        add("--tokenizer", help="default: the one the model was trained with")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 on failure, 2 for bad arguments (argparse)."""
    arguments = _parser().parse_args(argv)
    try:
        print(arguments.verb(arguments, read_facts(arguments.facts)))
    except (ValueError, OSError) as error:
        print(f"self_knowledge: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    from stablelm_jax.run_verb import run_verb

    run_verb(main, "self_knowledge", interrupted="run the same command again to go on")
