"""Conversations and preference pairs out of manuals in seven languages.

    python launch/corpora/chat_corpus.py --input DIR --tokenizer FILE --output DIR

DIR holds what launch/demo_chat.sh fetched: `libreoffice_help_<language>.jsonl`, which html_text.py
wrote, and the unpacked packages `debian-faq[-<language>]`. For each language is written, a JSON
record a line:

    howto_<language>.jsonl   the title of a how-to page or a question of the FAQ, and its answer
    random_<language>.jsonl  the same requests, each answered in a language drawn at random
    pairs_<language>.jsonl   the same requests; chosen: the answer in the language of the request,
                             rejected: the answer to the same question in another language

`topic` names the page or question, the same in all languages, for `prepare --held-out-by topic`.
Answers are cut behind whole paragraphs so that a conversation has --max-tokens at most, a side of a
pair --pair-tokens. What was cut and left out is counted. Needs resiliparse (extra `demo`).
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stablelm_jax.storage.files import replacing
from stablelm_jax.tokenizer.chat import chat_template, encode_conversation
from stablelm_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer

LANGUAGES = ("en", "de", "es", "fr", "it", "nl", "pt")  # Stable LM 2's seven (model card)
TEMPLATE = "zephyr"  # the one that prepare uses by default, so that lengths are counted alike
_UNTRANSLATED = 0.2  # of the letters: names and samples of code stay as they are
_SENTENCE_ENDS = tuple(".!?…)»”\"'")


class Page(NamedTuple):
    topic: str
    language: str
    title: str
    paragraphs: tuple[str, ...]


class Cutter:
    """Cuts answers so that a conversation has `most` tokens; `counts` says what became of them."""

    def __init__(self, tokenizer: Tokenizer, most: int):
        self._tokenizer, self._template = tokenizer, chat_template(TEMPLATE, tokenizer)
        self._most = most
        self.counts: collections.Counter[str] = collections.Counter()

    def answer(self, request: str, paragraphs: Sequence[str]) -> str:
        """As many whole paragraphs as fit, up to the last one that ends a sentence.

        Headings, lists of links and "do this:" at the end go, too. Empty where nothing is left.
        """
        number = self._guess(paragraphs)
        while number and self._length(request, paragraphs[:number]) > self._most:
            number -= 1
        was_cut = number < len(paragraphs)
        while number and not paragraphs[number - 1].endswith(_SENTENCE_ENDS):
            number -= 1
        self.counts["nothing fits" if not number else "cut" if was_cut else "whole"] += 1
        return "\n\n".join(paragraphs[:number])

    def _guess(self, paragraphs: Sequence[str]) -> int:
        """How many paragraphs may fit by their own lengths: encoding whole answers takes long."""
        total = 0
        for number, paragraph in enumerate(paragraphs):
            total += len(self._tokenizer.encode(paragraph))
            if total > self._most:
                return number
        return len(paragraphs)

    def _length(self, request: str, paragraphs: Sequence[str]) -> int:
        messages = conversation(request, "\n\n".join(paragraphs))
        return len(encode_conversation(self._tokenizer, messages, self._template).ids)


def conversation(request: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]


def help_pages(folder: Path) -> Iterator[Page]:
    """The how-to pages of LibreOffice's help, of all languages."""
    for language in LANGUAGES:
        with open(folder / f"libreoffice_help_{language}.jsonl", encoding="utf-8") as file:
            for page in map(json.loads, file):
                topic = page["id"].partition("/text/")[2].removesuffix(".html")
                if "/guide/" in topic:
                    title, *paragraphs = page["text"].split("\n\n")
                    stripped = tuple(text.strip() for text in paragraphs)
                    yield Page(topic, language, title.strip(), stripped)


def faq_pages(folder: Path) -> Iterator[Page]:
    """The questions of the Debian FAQ with their answers; there is no Spanish one."""
    for language in LANGUAGES:
        package = folder / ("debian-faq" if language == "en" else f"debian-faq-{language}")
        for path in sorted(package.rglob(f"*.{language}.html")):
            for anchor, title, paragraphs in _sections(path.read_text(encoding="utf-8")):
                question = title.lstrip("0123456789. \xa0")
                if question.endswith("?"):
                    yield Page(f"faq/{anchor}", language, question, paragraphs)


def _sections(html: str) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(anchor, title, paragraphs) of the sections that hold no other sections."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    for section in HTMLTree.parse(html).body.query_selector_all("div.section"):
        if not section.query_selector_all("div.section"):
            text = extract_plain_text(section.html, skip_elements=[".titlepage"], alt_texts=False)
            title = " ".join(section.query_selector(".title").text.split())
            paragraphs = tuple(part.strip() for part in text.strip().split("\n\n"))
            yield section.query_selector(".title a[id]").id, title, paragraphs


def usable(pages: Sequence[Page], counts: collections.Counter[str]) -> list[Page]:
    """The pages whose title says in which language the answer is to be.

    Left out and counted: pages that are not translated, titles that several languages share.
    """
    english = {page.topic: set(page.paragraphs) for page in pages if page.language == "en"}
    kept, languages = [], collections.defaultdict(set)
    for page in pages:
        same = [text for text in page.paragraphs if text in english.get(page.topic, ())]
        share = len("".join(same)) / max(len("".join(page.paragraphs)), 1)
        if page.language == "en" or share < _UNTRANSLATED:
            kept.append(page)
            languages[page.title].add(page.language)
    clear = [page for page in kept if len(languages[page.title]) == 1]
    counts["not translated"] += len(pages) - len(kept)
    counts["title of several languages"] += len(kept) - len(clear)
    return clear


def groups(pages: Sequence[Page]) -> dict[str, str]:
    """{topic: what it is held out by}: topics that share a title in some language are one group.

    Else a question would be trained that is held out under another topic.
    """
    parent: dict[str, str] = {}
    first_of_title: dict[str, str] = {}

    def root(topic: str) -> str:
        while parent.get(topic, topic) != topic:
            topic = parent[topic]
        return topic

    for page in pages:
        first = first_of_title.setdefault(page.title, page.topic)
        parent[root(page.topic)] = root(first)
    return {page.topic: root(page.topic) for page in pages}


def draw(choices: Sequence[str], *key: object) -> str:
    """One of `choices`, the same for the same key on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return choices[int.from_bytes(digest[:8], "big") % len(choices)]


def records(
    pages: Sequence[Page], cutters: Mapping[str, Cutter]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(kind, language of the request, record) of all that is written."""
    group, by_topic = groups(pages), collections.defaultdict(dict)
    for page in pages:
        by_topic[page.topic][page.language] = page
    for page in pages:
        topic, parallel = {"topic": group[page.topic]}, by_topic[page.topic]
        if answer := cutters["howto"].answer(page.title, page.paragraphs):
            yield "howto", page.language, {"messages": conversation(page.title, answer), **topic}
        # Drawn among all languages there are, the right one too: no rule is to be learned.
        language = draw(sorted(parallel), "answer", page.topic, page.language)
        if answer := cutters["random"].answer(page.title, parallel[language].paragraphs):
            yield "random", page.language, {"messages": conversation(page.title, answer), **topic}
        if others := sorted(set(parallel) - {page.language}):
            language = draw(others, "rejected", page.topic, page.language)
            sides = [page.paragraphs, parallel[language].paragraphs]
            answers = [cutters["pairs"].answer(page.title, side) for side in sides]
            if all(answers):
                whole = [conversation(page.title, answer) for answer in answers]
                pair = {"prompt": whole[0][:1], "chosen": whole[0][1:], "rejected": whole[1][1:]}
                yield "pairs", page.language, {**pair, **topic}


def write(source: Path, output: Path, cutters: Mapping[str, Cutter]) -> list[str]:
    """Writes a file for each of `cutters`; returns lines on what is in them and what is not.

    Raises:
      OSError: a file of `source` is missing.
      ValueError: there is no how-to page or no FAQ in it.
    """
    pages, left_out = [], collections.Counter()
    for read, what in ((help_pages, "how-to page of the help"), (faq_pages, "question of the FAQ")):
        found = list(read(source))
        if not found:
            raise ValueError(f"{source} holds no {what}; run launch/demo_chat.sh, which fetches it")
        pages += found
    clear = usable(pages, left_out)
    output.mkdir(parents=True, exist_ok=True)
    written: dict[str, dict[str, list[bytes]]] = {
        kind: {language: [] for language in LANGUAGES} for kind in cutters
    }
    for kind, language, record in records(clear, cutters):
        written[kind][language].append(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    reasons = ", ".join(f"{reason} {count}" for reason, count in left_out.items())
    lines = [f"{len(pages):,} pages and questions; left out: {reasons}"]
    for kind, found in written.items():
        for language, records_of_it in found.items():
            with replacing(output / f"{kind}_{language}.jsonl") as aside:
                Path(aside).write_bytes(b"".join(records_of_it))
        counts = ", ".join(f"{language} {len(found[language]):,}" for language in found)
        answers = ", ".join(f"{what} {n:,}" for what, n in sorted(cutters[kind].counts.items()))
        lines.append(f"{kind}: {sum(map(len, found.values())):,} records: {counts}")
        lines.append(f"{kind}: answers: {answers}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 on failure, 2 for bad arguments (argparse)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--input", type=Path, required=True, metavar="DIR", help="what was fetched")
    add("--tokenizer", required=True, metavar="FILE", help="tokenizer.json, to count lengths by")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--max-tokens", type=int, default=256, help="of a conversation (%(default)s)")
    add("--pair-tokens", type=int, default=160, help="of a side of a pair (%(default)s)")
    arguments = parser.parse_args(argv)
    try:
        tokenizer = load_tokenizer(arguments.tokenizer)
        most = {"howto": arguments.max_tokens, "random": arguments.max_tokens}
        most["pairs"] = arguments.pair_tokens
        cutters = {name: Cutter(tokenizer, number) for name, number in most.items()}
        lines = write(arguments.input, arguments.output, cutters)
    except (ValueError, OSError) as error:
        print(f"chat_corpus: {error}", file=sys.stderr)
        return 1
    except ImportError:
        print("chat_corpus: needs resiliparse; pip install -e '.[demo]'", file=sys.stderr)
        return 1
    print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
