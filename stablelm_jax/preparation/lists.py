"""Lists beside shards, such as of what was rejected: a line of JSON for each thing."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from stablelm_jax.storage.files import replacing

DROPPED_NAME = "dropped.jsonl"  # some of the documents that filters dropped
CONTAMINATED_NAME = "contaminated.jsonl"  # documents with items of benchmarks
NAMES = ("rejected.jsonl", "left_out.jsonl", DROPPED_NAME, CONTAMINATED_NAME)


def write_list(path: pathlib.Path, things: Iterable[Mapping[str, Any]]) -> None:
    """Writes a list, however long; nobody ever sees half of it."""
    with replacing(path) as aside, open(aside, "w", encoding="utf-8") as listed:
        listed.writelines(json.dumps(thing, ensure_ascii=False) + "\n" for thing in things)


def read_list(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """What `write_list` wrote."""
    with open(path, encoding="utf-8") as lines:
        yield from map(json.loads, lines)
