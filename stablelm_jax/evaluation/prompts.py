"""Questions out of token shards: what stands before the first answer of a conversation."""

from __future__ import annotations

import itertools
import os.path
from collections.abc import Iterable, Iterator

from stablelm_jax.data.manifest import Source, open_shard
from stablelm_jax.data.shards import read_spans
from stablelm_jax.tokenizer.chat import ChatTemplate, render_chat
from stablelm_jax.tokenizer.tokenizer import Tokenizer


def held_out_prompts(
    sources: Iterable[Source], tokenizer: Tokenizer, limit: int
) -> Iterator[tuple[list[int], str]]:
    """(token ids up to the first trained one, language) of held-out conversations and pairs.

    `limit` of a source at most; text has none, and both sides of a pair have the same. What is
    trained as a bad answer is not asked for. The language is "" where a source has none or several.
    Errors are those of `open_shard`.
    """
    for source in sources:
        languages = source.manifest.languages
        for prompt in itertools.islice(_prompts(source, tokenizer), limit):
            yield prompt, languages[0] if len(languages) == 1 else ""


def _prompts(source: Source, tokenizer: Tokenizer) -> Iterator[list[int]]:
    kind = source.manifest.kind
    if kind == "text":
        return
    opening = _opening(ChatTemplate.from_json(source.manifest.chat))
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


def _opening(template: ChatTemplate) -> str:
    """What a template writes where an answer is asked for."""
    said = [{"role": "user", "content": "Hi"}]
    asked, bare = (render_chat(said, template, answer=answer) for answer in (True, False))
    return asked[len(os.path.commonprefix([asked, bare])) :]
