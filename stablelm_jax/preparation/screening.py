"""What the filters say of a document: the text to keep, or which of them drops it, and why.

The filter by language stands here too, which datatrove has for fastText alone.
"""

from __future__ import annotations

import bisect
import itertools
import operator
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result
from datatrove.utils.lid import FT176LID, LID
from rich.console import Console

from stablelm_jax.data.manifest import MANIFEST_NAME
from stablelm_jax.preparation import filters
from stablelm_jax.preparation.chunks import Record
from stablelm_jax.preparation.finding import shown
from stablelm_jax.preparation.held_out import content_hash
from stablelm_jax.preparation.lists import DROPPED_NAME, read_list, write_list
from stablelm_jax.preparation.streams import Rejected
from stablelm_jax.storage.remote import described

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


class _Py3langid(LID):
    """py3langid as one of datatrove's identifiers: its model comes with the package."""

    def __init__(self, languages: list[str]):
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        super().__init__(languages)
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def predict(self, doc: Document) -> tuple[tuple[str, float], dict[str, float]]:
        """(the likeliest label and its probability, the probabilities of `languages`)."""
        ranked = self._identifier.rank(doc.text)
        found = dict(ranked)
        return ranked[0], {label: found.get(label, 0.0) for label in self.languages}


class LanguageFilter(BaseFilter):
    """Keeps a document to which the model gives one of the languages by more than `threshold`.

    The rule is that of datatrove's LanguageFilter, which gives no reason.

    Args:
      languages: ISO 639-1 codes; `prepare` puts in those of the source.
      backend: py3langid; or ft176, fastText's model of 176 languages, which FineWeb used.
      model: a file for ft176, lid.176.bin or lid.176.ftz; datatrove downloads it if none is given.
    """

    def __init__(
        self,
        languages: Sequence[str] = (),
        threshold: float = 0.65,
        backend: str = "py3langid",
        model: str = "",
    ):
        super().__init__()
        self._languages, self._threshold = list(languages), threshold
        if backend == "py3langid":
            self._identifier: LID = _Py3langid(self._languages)
        elif backend == "ft176":
            self._identifier = FT176LID(self._languages)
            if model:  # datatrove would copy the file, and keep to the copy
                from fasttext.FastText import _FastText

                self._identifier._model = _FastText(model)
        else:
            raise ValueError(f"backend={backend}: there are py3langid and ft176")

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        (best, _), found = self._identifier.predict(doc)
        if any(share > self._threshold for share in found.values()):
            return True
        return False, f"not sure of {best}" if best in found else f"looks like {best}"


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
        write_list(path, (row for _, rows in sorted(self._rows.items()) for row in rows))


def show_dropped(directory: str, console: Console) -> None:
    """Prints the sample of each filter and reason, the most frequent first.

    ValueError where the source has none.
    """
    folder = pathlib.Path(directory)
    try:
        rows = list(read_list(folder / DROPPED_NAME))
    except OSError as error:
        why, others = error.strerror, sorted(folder.glob(f"*/{DROPPED_NAME}"))
        give = ", ".join(str(path.parent) for path in others) or "DATA/NAME"
        if (folder / MANIFEST_NAME).exists():
            why = "was prepared without --filters"
        elif folder.is_dir():
            why = "is no source"
        raise ValueError(
            f"--show-dropped {directory}: {why}; give a source prepared with --filters: {give}"
        ) from error
    total, kinds = 0, itertools.groupby(rows, key=lambda row: (row["by"], row["reason"]))
    for sample in sorted((list(of) for _, of in kinds), key=lambda sample: -sample[0]["of"]):
        kind, count = Dropped(sample[0]["by"], sample[0]["reason"]), sample[0]["of"]
        console.print(f"{kind}: documents: {count:,}, shown: {len(sample)}\n")
        for row in sample:
            place = f"{row['file']}, line {row['line']:,}: {row['characters']:,} characters"
            text = (f"    {shown(line)}\n" for line in row["beginning"].splitlines() if line)
            console.print(f"  {place}\n{''.join(text)}")
        total += count
    console.print(f"documents dropped by filters: {total:,}, of {directory}")
