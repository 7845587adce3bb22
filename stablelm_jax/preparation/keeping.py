"""Which records of a data set belong to a source: those that `--keep KEY=PATTERN` asks for.

Several sources may lie in one data set and be told apart by a field: CulturaX by `source`, the Pile
by `meta.pile_set_name`. What is left out is no loss, but it is counted by its value.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

Keep = Sequence[tuple[str, str]]  # (key, pattern) pairs
Values = Mapping[str, str | None]  # what a record holds under the keys; None where there is none

_VALUE_CHARACTERS = 80
_VALUES_COUNTED = 1000  # different values of an output; what more there are is counted as one
_VALUES_SHOWN = 20
OTHERS = "others"


@dataclasses.dataclass(frozen=True)
class NotKept:
    """A record of the data set that belongs to another source."""

    values: Values


def value_text(value: Any) -> str:
    """A value as patterns see it: a string as it is, anything else as JSON."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text[:_VALUE_CHARACTERS]


def is_kept(keep: Keep, values: Values) -> bool:
    """Whether the value of each key fits one of its patterns, upper or lower case."""
    fits = dict.fromkeys((key for key, _ in keep), False)
    for key, pattern in keep:
        value = values.get(key)
        fits[key] |= value is not None and fnmatchcase(value.lower(), pattern.lower())
    return all(fits.values())


def for_all(keeps: Sequence[Keep | None]) -> Keep | None:
    """What reads the records of several sources, which keep by the same keys, at once."""
    first, *others = keeps
    return [(key, "*") for key, _ in first] if others else first


def for_source(content: Any, keep: Keep | None) -> Any:
    """What was read of a record, as the source sees it that keeps by `keep`.

    A record that could not be read at all has no values, and is every source's.
    """
    values = getattr(content, "values", None)
    return content if values is None or is_kept(keep or (), values) else NotKept(values)


def count(counts: dict[str, int], values: Values) -> None:
    """Adds a record to the counts by value."""
    one = len(values) == 1
    texts = [f"no key {key}" if value is None else value for key, value in values.items()]
    label = ", ".join(texts if one else map("=".join, zip(values, texts)))
    label = label if label in counts or len(counts) < _VALUES_COUNTED else OTHERS
    counts[label] = counts.get(label, 0) + 1


def total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of counts by value: the most frequent ones, and the others together."""
    added = sum(map(collections.Counter, counts), collections.Counter())
    others = added.pop(OTHERS, 0)
    shown = dict(added.most_common(_VALUES_SHOWN))
    others += added.total() - sum(shown.values())
    return shown | ({OTHERS: others} if others else {})
