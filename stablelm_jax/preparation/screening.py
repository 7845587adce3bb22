"""What the filters say of a document: the text to keep, or which of them drops it, and why."""

from __future__ import annotations

import bisect
import json
import operator
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result

from stablelm_jax.preparation import filters
from stablelm_jax.preparation.chunks import Record
from stablelm_jax.preparation.held_out import content_hash
from stablelm_jax.preparation.streams import Rejected
from stablelm_jax.storage.files import write_text
from stablelm_jax.storage.remote import described

DROPPED_NAME = "dropped.jsonl"
# spaCy, which finds the words, takes 90 bytes of memory for a character, and a time that grows by
# the square of the length of a run of signs: 10,000 brackets in a row take it 17 seconds.
_MOST_CHARACTERS = 10_000_000
_MANY_SIGNS = re.compile(r"(?:[^\w\s]|_){1000}")
_SAMPLED, _BEGINNING = 20, 500  # documents of each filter and reason, and characters of each
# Ordinary text, which every filter reads to its end.
_TRIAL = "\n".join(
    f"Page {number} of the book tells that {number + 3} people have walked to town {number + 7},"
    f" with a friend of number {number + 11} and the dog."
    for number in range(12)
)


class Dropped(NamedTuple):
    """A document that a filter drops."""

    by: str  # name of the filter
    reason: str

    def __str__(self) -> str:
        """What such documents are counted as."""
        return f"{self.by}: {self.reason}"


class Screen:
    """The filters of a source, in order: what one keeps, perhaps changed, the next one reads."""

    def __init__(self, steps: Iterable[dict[str, Any]]):
        """Makes the filters, and tries each on a text: what it needs and lacks is known at once.

        Raises FilterError: a package or a model is missing, or a parameter makes no sense.
        """
        self._filters: list[tuple[str, BaseFilter]] = []
        for step in steps:
            try:
                made = filters.build(step)
                made.filter(Document(text=_TRIAL, id=""))
            except Exception as error:  # a filter may raise what it likes
                raise filters.FilterError(
                    f"--filters {step['name']}: {described(error)}{_remedy(step, error)}"
                ) from error
            self._filters.append((step["name"], made))

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Screen | None:
        """That of the settings of a source; None where it has no filters."""
        asked = settings.get("filters")
        return cls(asked["steps"]) if asked else None

    def judge(self, text: str) -> str | Dropped | Rejected:
        """The text to keep; or why it is not kept.

        It is `Rejected` where a filter fails on it: an odd document costs itself alone.
        """
        if len(text) > _MOST_CHARACTERS:
            return Rejected(f"too long for filters: more than {_MOST_CHARACTERS:,} characters")
        if _MANY_SIGNS.search(text):
            return Rejected("too many signs in a row for filters: 1,000 without a letter or space")
        document = Document(text=str(text), id="")
        for name, step in self._filters:
            try:
                is_kept, reason = get_filter_result(step.filter(document))
            except MemoryError:
                raise
            except Exception as error:
                return Rejected(f"filter {name} failed: {described(error)}")
            if not (is_kept and document.text):
                return Dropped(name, "nothing is left" if is_kept else reason or "no reason given")
        return document.text


def _remedy(step: Mapping[str, Any], error: Exception) -> str:
    if step["parameters"].get("backend") == "ft176":
        return (
            "; ft176 needs pip install -e '.[fasttext]' and a model; if datatrove cannot download"
            " it, give model='FILE', lid.176.bin or lid.176.ftz"
        )
    is_ours = isinstance(error, ImportError) and step["name"] in filters.FILTERS
    return "; pip install -e '.[filters]'" if is_ours else ""


class DroppedSample:
    """A few dropped documents of each filter and reason, to be looked at.

    They are those whose places in the source have the lowest hashes, so the choice depends neither
    on workers nor on interruptions.
    """

    def __init__(self):
        self._rows: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def add(self, record: Record, dropped: Dropped, place: str) -> None:
        """Takes a document; `place` is its own, and the same in every attempt."""
        where = {"file": record.file.name, "line": record.line, "characters": len(record.content)}
        rank = content_hash(place.encode())
        beginning = {"beginning": record.content[:_BEGINNING], "rank": rank}
        self.add_row({**dropped._asdict(), **where, **beginning})

    def add_row(self, row: dict[str, Any]) -> None:
        """Takes a row of another sample."""
        rows = self._rows.setdefault((row["by"], row["reason"]), [])
        bisect.insort(rows, row, key=operator.itemgetter("rank"))
        del rows[_SAMPLED:]

    def write(self, path: pathlib.Path) -> None:
        """Writes a line of JSON for each document."""
        rows = [row for _, rows in sorted(self._rows.items()) for row in rows]
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
