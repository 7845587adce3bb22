"""What a chat model answers, and what can be measured of it without a judge.

The numbers tell whether the model has learnt the form of a conversation (it ends its answers, does
not say the user's words back, keeps to the language), not whether an answer is right.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os.path
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from stablelm_jax.data.manifest import Source, open_shard
from stablelm_jax.data.shards import read_spans
from stablelm_jax.generation.generator import Generator
from stablelm_jax.tokenizer.chat import ChatTemplate, render_chat, stop_ids
from stablelm_jax.tokenizer.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256
_SAMPLED = {"temperature": 0.7, "top_p": 0.95, "seed": 0}  # as `generate` does by default


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer without special tokens; `ended`: by itself, before the limit of tokens cut it."""

    text: str
    tokens: int
    ended: bool


@dataclasses.dataclass(frozen=True)
class Question:
    """A conversation as far as the answer that is asked for."""

    prompt: Sequence[int]  # as `encode_chat` gives it
    said: str  # the user's last message; the template's words around it do no harm
    language: str = ""  # that the answer should be in, ISO 639-1; "" where it is not known


def held_out_questions(
    sources: Iterable[Source], tokenizer: Tokenizer, limit: int
) -> list[Question]:
    """The beginnings, up to the first trained token, of held-out conversations and pairs.

    `limit` of a source at most; text has none, and both sides of a pair have the same. What is
    trained as a bad answer is not asked for. Errors are those of `open_shard`.
    """
    found = []
    for source in sources:
        languages = source.manifest.languages
        language = languages[0] if len(languages) == 1 else ""
        for prompt in itertools.islice(_prompts(source, tokenizer), limit):
            found.append(Question(prompt, tokenizer.decode(prompt), language))
    return found


def _prompts(source: Source, tokenizer: Tokenizer) -> Iterator[list[int]]:
    kind = source.manifest.kind
    if kind == "text":
        return
    # What the template writes where an answer is asked for.
    template = ChatTemplate.from_json(source.manifest.chat)
    said = [{"role": "user", "content": "Hi"}]
    asked, bare = (render_chat(said, template, answer=answer) for answer in (True, False))
    opening = asked[len(os.path.commonprefix([asked, bare])) :]
    for info in source.manifest.held_out.shards:
        path = source.directory / info.file
        shard, lengths = open_shard(path, info), {}
        for document, first, _ in read_spans(path, info).tolist():
            lengths.setdefault(document, first)
        for document, length in lengths.items():
            if kind != "pairs" or document % 2 == 0:
                begin = int(shard.document_offsets[document])
                prompt = shard.read(begin, begin + length).tolist()
                if tokenizer.decode(prompt).endswith(opening):  # and not the negative marker
                    yield prompt


def answer_all(
    generator: Generator,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    **sampling: Any,
) -> list[Answer]:
    """The answer to each prompt; where the context has less room a shorter one, or an empty one."""
    stops = sorted({tokenizer.eod, *stop_ids(tokenizer, template)})
    answers = [Answer("", 0, False)] * len(prompts)
    groups = collections.defaultdict(list)
    for i, prompt in enumerate(prompts):
        room = generator.max_length - len(prompt)
        if room < max_new_tokens:
            room = room - room % 32 or room  # few groups: each is run by itself
        groups[min(room, max_new_tokens)].append(i)
    for room in sorted(room for room in groups if room > 0):
        limits = {"max_new_tokens": room, "stop_tokens": stops}
        new = generator.generate([prompts[i] for i in groups[room]], **limits, **sampling)
        for i, tokens in zip(groups[room], new):
            text = tokenizer.decode([t for t in tokens if t not in tokenizer.special_ids])
            answers[i] = Answer(text.strip(), len(tokens), len(tokens) < room)
    return answers


def measure_answers(
    generator: Generator,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    conversations: Sequence[Question],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    sampled: Mapping[str, Any] = _SAMPLED,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Answers each conversation twice, greedily and sampled, and measures the answers.

    Returns:
      {"conversations": N} and, for HOW of greedy and sampled, means over the answers: HOW/ended (by
      themselves, within `max_new_tokens`), HOW/tokens, HOW/repeats_user (`repeats`), HOW/distinct_2
      (`distinct_pairs`); HOW/language and HOW/language/CODE (in the asked one), where languages are
      known and py3langid is installed. Then {"question", HOW, HOW_ended} of each conversation.
    """
    found: dict[str, float] = {"conversations": len(conversations)}
    samples: list[dict[str, Any]] = [{"question": one.said} for one in conversations]
    language_of = _language_detector({one.language for one in conversations} - {""})
    prompts = [one.prompt for one in conversations]
    for how, settings in (("greedy", {"temperature": 0.0}), ("sampled", sampled)):
        settings = {"max_new_tokens": max_new_tokens, **settings}
        answers = answer_all(generator, tokenizer, template, prompts, **settings)
        values = collections.defaultdict(list)
        for question, answer, sample in zip(conversations, answers, samples):
            sample |= {how: answer.text, f"{how}_ended": answer.ended}
            for name, value in _measured(question, answer, language_of).items():
                values[f"{how}/{name}"].append(value)
        found |= {name: fmean(of_all) for name, of_all in values.items()}
    return found, samples


def _measured(question: Question, answer: Answer, language_of: Any) -> dict[str, float]:
    found = {"ended": answer.ended, "tokens": answer.tokens}
    found["repeats_user"] = repeats(answer.text, question.said)
    if (distinct := distinct_pairs(answer.text)) is not None:
        found["distinct_2"] = distinct
    if question.language and language_of:
        right = language_of(answer.text) == question.language
        found |= {"language": right, f"language/{question.language}": right}
    return found


def repeats(answer: str, said: str) -> bool:
    """Whether more than half of the answer's runs of four words stand in what the user said."""
    words, said = answer.lower().split(), f" {' '.join(said.lower().split())} "
    runs = [f" {' '.join(words[i : i + 4])} " for i in range(len(words) - 3)]
    return 2 * sum(run in said for run in runs) > len(runs)


def distinct_pairs(text: str) -> float | None:
    """Distinct pairs of neighbouring words by all pairs: 1 where none comes twice, None without.

    It is distinct-2 of Li et al. 2016 (arXiv 1510.03055), of one text.
    """
    words = text.lower().split()
    pairs = list(zip(words, words[1:]))
    return len(set(pairs)) / len(pairs) if pairs else None


def _language_detector(languages: Collection[str]) -> Callable[[str], str] | None:
    """f(text) -> the likeliest of several languages, or of all that are known if there is one."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        return None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    known = sorted(set(languages) & set(identifier.labels))
    if len(known) > 1:
        identifier.set_languages(known)
    return lambda text: identifier.classify(text)[0] if text else ""
