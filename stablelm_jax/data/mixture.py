"""The mixture rule: which source gives row i, and which of its rows.

Weights are quantised to whole numbers of rows over a period of at most 65,536. Within a period the
rows are dealt out by Tijdeman's rule, so that at every row no source is a whole row ahead of or
behind its weight; a table of one period then answers for any row at once.

Tijdeman (1980), "The chairman assignment problem": with K sources of shares w_s and x_s rows dealt
so far, row t (counted from 1) may go to a source with w_s t - x_s >= 1 / (2K - 2), and goes to the
one of them that would first fall 1 - 1 / (2K - 2) behind. No source then ever deviates by more than
1 - 1 / (2K - 2). Row j of source s thus has a first and a last t at which it can be dealt; both are
computed here as integers, and among the open rows the one that closes first is taken, sources of
one last t in the order of their names.
"""

from __future__ import annotations

import dataclasses
import fractions
import heapq
import math
from collections.abc import Mapping, Sequence

import numpy as np

MAX_PERIOD = 65_536


def quantise(weights: Mapping[str, float]) -> dict[str, int]:
    """Rows of each source in one period: whole numbers in the proportion of the weights.

    Decimal weights are kept exactly where the period then fits (0.7 and 0.3 give 7 and 3);
    otherwise the period is 65,536, filled by largest remainder, at least 1 for a positive weight.
    Sources of weight 0 are left out.

    Raises:
      ValueError: a weight that is negative or not finite, or no positive one.
    """
    exact = {name: _exact(name, weights[name]) for name in sorted(weights)}
    total = sum(exact.values())
    if not total:
        raise ValueError(f"mixture weights {dict(weights)}: none is positive; give one at least")
    shares = {name: weight / total for name, weight in exact.items() if weight}
    period = math.lcm(*(share.denominator for share in shares.values()))
    if period > MAX_PERIOD:
        return _largest_remainder(shares, MAX_PERIOD)
    return {name: int(share * period) for name, share in shares.items()}


def _exact(name: str, weight: float) -> fractions.Fraction:
    if not math.isfinite(weight) or weight < 0:
        raise ValueError(
            f"mixture weight of {name!r} is {weight}; use a positive number, or 0 to leave it out"
        )
    # By its shortest decimal spelling: 0.7 is meant as 7/10, not as the nearest binary fraction.
    return fractions.Fraction(str(float(weight)))


def _largest_remainder(shares: Mapping[str, fractions.Fraction], period: int) -> dict[str, int]:
    counts = {name: max(1, math.floor(share * period)) for name, share in shares.items()}
    missing = period - sum(counts.values())
    step = 1 if missing > 0 else -1
    for _ in range(abs(missing)):
        # To give: the source furthest below its share. To take: the one furthest above it that
        # has a row to spare (only when tiny weights were lifted to one row).
        names = [name for name in counts if step > 0 or counts[name] > 1]
        furthest = max(names, key=lambda name: step * (shares[name] * period - counts[name]))
        counts[furthest] += step
    return counts


@dataclasses.dataclass(frozen=True)
class Stage:
    """A span of rows with one set of weights.

    Attributes:
      first_row: global row at which it begins.
      counts: int64 [sources], rows of each source in one period.
      table: int32 [period], the source of each row of a period.
      rank: int32 [period], earlier rows of the same source in the period.
      offset: int64 [sources], rows that each source gave before `first_row`.
    """

    first_row: int
    counts: np.ndarray
    table: np.ndarray
    rank: np.ndarray
    offset: np.ndarray

    @property
    def period(self) -> int:
        return len(self.table)

    def rows_before(self, row: int) -> np.ndarray:
        """int64 [sources], rows that each source gave before global row `row` of this stage."""
        periods, rest = divmod(row - self.first_row, self.period)
        partial = np.bincount(self.table[:rest], minlength=len(self.counts))
        return self.offset + periods * self.counts + partial


class Mixture:
    """Maps a global row to a source and a row of that source, in stages of fixed weights.

    Attributes:
      spans: `(first_row, rows of each source in a period)` of each stage. A source that a stage
        does not name has weight 0 there; each source goes on where it stopped.
      sources: names of all sources, sorted. Source indices refer to this order.
      stages: the stages, tables included.
    """

    def __init__(self, spans: Sequence[tuple[int, Mapping[str, int]]]):
        """ValueError: stages out of order."""
        if not spans or spans[0][0] != 0:
            raise ValueError(f"mixture stages {spans}: the first begins at row 0")
        self.spans = list(spans)
        self.sources = tuple(sorted({name for _, counts in spans for name in counts}))
        self.stages: tuple[Stage, ...] = ()
        for first_row, counts in spans:
            self.stages += (self._stage(first_row, counts),)

    def _stage(self, first_row: int, counts: Mapping[str, int]) -> Stage:
        offset = np.zeros(len(self.sources), np.int64)
        if self.stages:
            before = self.stages[-1]
            if first_row <= before.first_row:
                raise ValueError(
                    f"mixture stage at row {first_row} after one at row {before.first_row};"
                    " stages begin at row 1 or later, in rising order"
                )
            offset = before.rows_before(first_row)
        per_source = np.array([counts.get(name, 0) for name in self.sources], np.int64)
        table = _selection_table(per_source)
        return Stage(first_row, per_source, table, _ranks(table, per_source), offset)

    def _stage_of(self, row: int) -> Stage:
        if row < 0:
            raise ValueError(f"row {row}: rows are counted from 0")
        index = len(self.stages) - 1
        while self.stages[index].first_row > row:
            index -= 1
        return self.stages[index]

    def locate(self, row: int) -> tuple[int, int]:
        """`(source index, index among that source's rows)` of a global row, in constant time."""
        stage = self._stage_of(row)
        periods, rest = divmod(row - stage.first_row, stage.period)
        source = stage.table.item(rest)
        earlier = stage.offset.item(source) + periods * stage.counts.item(source)
        return source, earlier + stage.rank.item(rest)

    def rows_before(self, row: int) -> np.ndarray:
        """int64 [sources], rows that each source gave among the global rows [0, row)."""
        return self._stage_of(row).rows_before(row)


def _selection_table(counts: np.ndarray) -> np.ndarray:
    """int32 [period]: the sources of one period's rows by Tijdeman's rule, `counts` of each."""
    period, dealt = int(counts.sum()), np.flatnonzero(counts)
    if len(dealt) == 1:
        return np.full(period, dealt[0], np.int32)
    source = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(period) - np.repeat(np.cumsum(counts) - counts, counts)
    unit = 2 * len(dealt) - 2
    scale = unit * counts[source]
    opens = -(-period * (number * unit + 1) // scale)
    closes = period * (number * unit + unit - 1) // scale + 1
    by_opening = np.argsort(opens, kind="stable")
    # A row's place in the heap: when it closes, then its source.
    key = (closes * len(counts) + source)[by_opening].tolist()
    opens = opens[by_opening].tolist()
    table, heap, next_row = [], [], 0
    for t in range(1, period + 1):
        while next_row < period and opens[next_row] <= t:
            heapq.heappush(heap, key[next_row])
            next_row += 1
        last, chosen = divmod(heapq.heappop(heap), len(counts))
        assert last >= t, "Tijdeman: some row was dealt too late"
        table.append(chosen)
    return np.array(table, np.int32)


def _ranks(table: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int32 [period]: how many earlier rows of the period have the same source."""
    rank = np.empty(len(table), np.int32)
    by_source = np.argsort(table, kind="stable")
    rank[by_source] = np.arange(len(table)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank
