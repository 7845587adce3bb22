"""Which documents hold items of the benchmarks: n-grams of words that both have.

An n-gram is 13 words in a row (as in the GPT-3 paper, appendix C), in lower case and without
punctuation. An item's texts are its fields: the question, each answer, a passage. A text of 8 to 12
words counts as one n-gram; a shorter one says nothing. Neither does an n-gram of many items, such
as an instruction that all of a task's prompts begin with.
"""

from __future__ import annotations

import collections
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

WORDS, FEWEST_WORDS = 13, 8
# An n-gram that more items than this share is a form of words, not an item.
MOST_ITEMS = 10
_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so no bit of a word is lost
_REST = np.uint64(39)  # bits of an n-gram's hash behind the 25 of a first look


class Item(NamedTuple):
    """An item of a benchmark: row `number`, from 0, of a file of the task's data."""

    task: str
    split: str
    number: int


class _Hashes(dict):
    """64 bits of BLAKE2b of a word, each computed once."""

    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        value = int.from_bytes(digest, "little")
        if len(self) < 1 << 20:  # names and numbers have no end
            self[word] = value
        return value


class Benchmarks:
    """The n-grams of all items of a folder of task data (`launch/corpora/task_data.py`).

    Attributes:
      sha256: of the data and of the rule; other benchmarks, or another rule, have another.
      items: how many items of each task have n-grams that are looked for.
      too_short: how many items of each task have none.
    """

    def __init__(self, folder: str | pathlib.Path):
        """Raises ValueError where the folder is none of task data."""
        self._hashes = _Hashes()
        self._of = list(_items(pathlib.Path(folder)))
        digest = hashlib.sha256(f"{WORDS} {FEWEST_WORDS} {MOST_ITEMS}".encode())
        words, owners = [], []
        for number, (item, texts) in enumerate(self._of):
            digest.update(repr((item, texts)).encode("utf-8", "surrogatepass"))
            words += map(self._words, texts)
            owners += [number] * len(texts)
        self.sha256 = digest.hexdigest()
        self._grams, self._owners = _index(words, np.array(owners))
        self._beginnings = np.zeros(1 << 25, bool)
        self._beginnings[self._grams >> _REST] = True
        self.items = collections.Counter(self._of[n][0].task for n in np.unique(self._owners))
        every = collections.Counter(item.task for item, _ in self._of)
        self.too_short = every - self.items

    def find(self, text: str) -> list[Item]:
        """The items of which the text holds an n-gram, in the order of the data."""
        grams = np.concatenate(list(_grams(self._words(text))))
        # Far fewer are left: a search among millions is slow.
        grams = grams[self._beginnings[grams >> _REST]]
        first = np.searchsorted(self._grams, grams)
        is_known = self._grams[np.minimum(first, len(self._grams) - 1)] == grams
        last = np.searchsorted(self._grams, grams[is_known], "right")
        found = [self._owners[a:b] for a, b in zip(first[is_known], last)]
        return [self._of[number][0] for number in np.unique(np.concatenate(found))] if found else []

    def _words(self, text: str) -> np.ndarray:
        words = _WORD.findall(text.lower())
        return np.fromiter(map(self._hashes.__getitem__, words), np.uint64, len(words))


def _grams(words: np.ndarray) -> Iterator[np.ndarray]:
    """Hashes of FEWEST_WORDS words in a row, of one more, and so on, as many as there are or WORDS.

    uint64 [words - length + 1] each.
    """
    total = np.zeros(len(words), np.uint64)
    for i in range(max(FEWEST_WORDS, min(WORDS, len(words)))):
        total = total[: max(len(words) - i, 0)] * _FACTOR + words[i:]
        if i + 1 >= FEWEST_WORDS:
            yield total


def _index(texts: Sequence[np.ndarray], owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """n-grams in order and the item of each, without those that many items share.

    `texts`: the words of each text of an item; `owners`: the item of each text.
    """
    lengths = np.array(list(map(len, texts)))
    text_of, found = np.repeat(np.arange(len(texts)), lengths), []
    for length, grams in enumerate(_grams(np.concatenate(texts)), FEWEST_WORDS):
        first, last = text_of[: len(grams)], text_of[length - 1 :]
        is_one = (first == last) & ((length == WORDS) | (lengths[first] == length))
        found.append((grams[is_one], owners[first[is_one]]))
    grams, owners = map(np.concatenate, zip(*found))
    order = np.lexsort((owners, grams))
    grams, owners = grams[order], owners[order]
    is_new = np.ones(len(grams), bool)
    is_new[1:] = (grams[1:] != grams[:-1]) | (owners[1:] != owners[:-1])
    grams, owners = grams[is_new], owners[is_new]
    _, places, counts = np.unique(grams, return_inverse=True, return_counts=True)
    is_rare = counts[places] <= MOST_ITEMS
    if not is_rare.any():
        raise ValueError(f"no item of the task data has a text of {FEWEST_WORDS} words or more")
    return grams[is_rare], owners[is_rare]


def task_index(folder: pathlib.Path) -> dict[str, Any]:
    """{task: {"files": {split: path}, "changes", "note"}} of a folder of task data, paths whole.

    ValueError where it is none.
    """
    try:
        index = json.loads((folder / "tasks.json").read_text(encoding="utf-8"))["tasks"]
    except (OSError, ValueError, KeyError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is damaged"
        raise ValueError(
            f"{folder}: holds no task data (tasks.json: {why}); make it with "
            "python launch/corpora/task_data.py --output DIR"
        ) from error
    for entry in index.values():
        entry["files"] = {s: str((folder / file).resolve()) for s, file in entry["files"].items()}
    return index


def _items(folder: pathlib.Path) -> Iterator[tuple[Item, list[str]]]:
    for task, entry in sorted(task_index(folder).items()):
        for split, file in sorted(entry["files"].items()):
            for number, row in enumerate(pq.read_table(file).to_pylist()):
                yield Item(task, split, number), list(_texts(row))


def _texts(value: Any) -> Iterator[str]:
    """Every string in a row, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, Sequence):
        for each in value:
            yield from _texts(each)


def hit(file: str, line: int, item: Item) -> dict[str, Any]:
    """A row of the list: a document that holds something of an item."""
    return {"file": file, "line": line, "task": item.task, "split": item.split, "item": item.number}


def certificate(
    benchmarks: Benchmarks, hits: Sequence[Mapping[str, Any]], dropped: bool
) -> dict[str, Any]:
    """What the manifest says of the benchmarks in a source's text; `hits`: all rows of `hit`."""

    def documents(rows: Iterable[Mapping[str, Any]]) -> int:
        return len({(row["file"], row["line"]) for row in rows})

    tasks = {}
    for task in sorted(benchmarks.items | benchmarks.too_short):
        of_task = [row for row in hits if row["task"] == task]
        tasks[task] = {
            "items": benchmarks.items[task],
            "too_short": benchmarks.too_short[task],
            "items_hit": len({(row["split"], row["item"]) for row in of_task}),
            "documents": documents(of_task),
        }
    return {
        "benchmarks_sha256": benchmarks.sha256,
        "words": WORDS,
        "dropped": dropped,
        "documents": documents(hits),
        "tasks": tasks,
    }
