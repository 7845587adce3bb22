"""What `data.skip` leaves out of training: rows and documents, under a loss mask of 0.

A row keeps its place where it is left out, or a document in it is, so that every other row of the
run stays where it was. The loss of a step is the mean over what is left.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from stablelm_jax.data.manifest import Source
from stablelm_jax.data.packing import PackedRows, PackedSources
from stablelm_jax.data.rows import SourceRows

_ENTRY = re.compile(r"([a-z][a-z0-9_]*):(row|document)s?:(\d+)(?:-(\d+))?")
Spans = dict[str, list[tuple[int, int]]]  # by 'row' and 'document': first, and the one after last


def parse_skip(entries: Sequence[str]) -> dict[str, Spans]:
    """What `data.skip` names, by source; ValueError: an entry of another form."""
    found: dict[str, Spans] = {}
    for entry in entries:
        match = _ENTRY.fullmatch(entry) if isinstance(entry, str) else None
        if match is None or int(match[4] or match[3]) < int(match[3]):
            raise ValueError(
                f"{entry!r} names no rows or documents; write 'SOURCE:rows:FIRST-LAST' or "
                "'SOURCE:documents:FIRST-LAST', counted from 0, as inspect_data shows them"
            )
        spans = found.setdefault(match[1], {"row": [], "document": []})
        spans[match[2]].append((int(match[3]), int(match[4] or match[3]) + 1))
    return found


class LeftOut:
    """What is left out of the train split of one source. T places of a row."""

    def __init__(self, rows: SourceRows | PackedRows, spans: Spans):
        """ValueError: a row or document that is not there."""
        self._rows, offsets = rows, np.zeros(1, np.int64)
        if spans["document"]:
            offsets = rows.stream.document_offsets()
        for kind, count in (("row", len(rows)), ("document", len(offsets) - 1)):
            if (last := max((stop for _, stop in spans[kind]), default=0)) > count:
                raise ValueError(f"there is no {kind} {last - 1}: it has {count} {kind}s to train")
        self._numbers = np.array(spans["row"], np.int64).reshape(-1, 2)
        self._tokens = offsets[np.array(spans["document"], np.int64).reshape(-1, 2)]

    def places(self, row: int) -> np.ndarray | None:
        """bool [T]: which places of a row of the source are left out; None where none is.

        A place is left out where its input or its target is a token of a document that is.
        """
        if ((self._numbers[:, 0] <= row) & (row < self._numbers[:, 1])).any():
            return np.ones(self._rows.length, bool)
        found, place = np.zeros(self._rows.length, bool), 0
        for first, count in self._rows.extents(row):
            spans = np.clip(self._tokens - first - [1, 0], 0, count)
            for start, stop in spans[spans[:, 0] < spans[:, 1]].tolist():
                found[place + start : place + stop] = True
            place += count
        return found if found.any() else None

    def tokens(self, drawn: range) -> int:
        """Places left out of the rows drawn from the source, numbered in the order of training."""
        places = (self.places(self._rows.order(number)) for number in drawn)
        return sum(int(found.sum()) for found in places if found is not None)


def open_skip(
    entries: Sequence[str],
    sources: Mapping[str, Source],
    length: int,
    seed: int,
    packed: PackedSources | None,
) -> dict[str, LeftOut]:
    """What is left out of each source; `length` and `seed` are those of the run's `BatchSpec`.

    Raises:
      ValueError: an entry names something that is not there.
    """
    found = {}
    for name, spans in parse_skip(entries).items():
        if name not in sources:
            raise ValueError(f"{name!r} is no source of the run, which has {', '.join(sources)}")
        rows = packed[name, "train"] if packed else SourceRows(sources[name], length, seed)
        try:
            found[name] = LeftOut(rows, spans)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return found


def leave_out(
    batch: dict[str, np.ndarray], numbers: Sequence[int], left_out: Sequence[LeftOut | None]
) -> dict[str, np.ndarray]:
    """The batch, its loss mask 0 at the places left out; a pair with one of them is no pair.

    Args:
      numbers: of its rows, within their sources.
      left_out: by `source_ids`.
    """
    for place, (source, number) in enumerate(zip(batch["source_ids"].tolist(), numbers)):
        found = left_out[source] and left_out[source].places(number)
        if found is None:
            continue
        batch["loss_mask"][place, found] = 0
        if "pair_ids" in batch:
            gone = (np.unique(batch["segment_ids"][place, found]) - 1) // 2
            batch["pair_ids"][place, gone[gone < batch["pair_ids"].shape[1]]] = -1
    return batch
