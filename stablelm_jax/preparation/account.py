"""The account of what was found: every file, and every byte, is read, rejected or left out.

What counts as not read: a file of which no record is a document, the share of the records that were
rejected in any other, what lies behind a damage, and files that could not be opened. Empty records
and what is left out by a rule (hidden files, other names of a file) do not count.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping

from stablelm_jax.preparation.finding import InputFile, LeftOut
from stablelm_jax.preparation.streams import reason_kind

# More than this share of the bytes not read, and the source is refused; unless it is so little
# that a single odd file of a small source would do.
_MOST_UNREAD, _LITTLE = 0.1, 4096
_HOLDS_NOTHING = re.compile(r"empty .*|.* is (a JSON )?null\b.*")
# What is no loss: an archive's hidden files, links and metadata, and what a limit was to drop.
_NO_LOSS = re.compile(
    r"(hidden|a link or device) in an archive.*|no key .*\.json\)|too (many|long).*"
)
_LOSES_THE_REST = "the rest of the file is lost"
_WORST_SHOWN = 3


@dataclasses.dataclass
class Tally:
    """What became of the records of a file, but for those that hold nothing, such as empty lines.

    Attributes:
      lost: bytes of the file behind a damage that nothing can be read after.
      reason: of the first record that was rejected.
    """

    records: int = 0
    rejected: int = 0
    lost: int = 0
    reason: str = ""

    def add(self, rejected: str | None, left: int) -> None:
        """Counts a record, rejected for a reason or not, that `left` bytes of the file follow."""
        if rejected is not None and _HOLDS_NOTHING.fullmatch(rejected):
            return
        self.reason = self.reason or rejected or ""
        if rejected is not None and _NO_LOSS.fullmatch(rejected):
            return
        self.records += 1
        if rejected is not None:
            self.rejected += 1
            self.lost += left if _LOSES_THE_REST in rejected else 0

    def __add__(self, other: Tally) -> Tally:
        """With what another chunk or output holds of the same file."""
        sums = [a + b for a, b in zip(dataclasses.astuple(self)[:3], dataclasses.astuple(other))]
        return Tally(*sums, self.reason or other.reason)

    def unread(self, size: int) -> int:
        """How many of the bytes of the file, which has `size`, were not read as text."""
        if self.rejected == self.records:
            return size if self.reason else 0
        share = self.rejected / self.records
        return min(size, round(self.lost + (size - self.lost) * share))


@dataclasses.dataclass
class Account:
    """How many files, and bytes, ended in which way.

    Attributes:
      ends: {"read as jsonl": [files, bytes], "rejected: not UTF-8": ..., "left out: hidden": ...}.
      found: bytes that were to be read.
      unread: (bytes, name, reason) of what was not read as text.
    """

    ends: dict[str, list[int]]
    found: int = 0
    read: str = "read as"  # of a sample other words
    unread: list[tuple[int, str, str]] = dataclasses.field(default_factory=list)

    @classmethod
    def of(
        cls,
        files: Iterable[InputFile],
        tallies: Iterable[Mapping[str, Tally]],
        left_out: Iterable[LeftOut],
        read: str = "read as",
    ) -> Account:
        """The account of `files`, of whose records `tallies` count some each."""
        whole: dict[str, Tally] = collections.defaultdict(Tally)
        for path, tally in [item for each in tallies for item in each.items()]:
            whole[path] += tally
        account = cls({}, read=read)
        for file in files:
            account._add_file(file, whole[file.path])
        for item in left_out:
            account._add(f"left out: {reason_kind(item.reason)}", item.files, item.size or 0)
            if item.is_loss:
                account.found += item.size or 0
                account.unread.append((item.size or 0, item.name, item.reason))
        return account

    def _add_file(self, file: InputFile, tally: Tally) -> None:
        size = file.size or 0
        if not tally.reason and not tally.records:
            end = "empty"
        elif tally.rejected == tally.records:
            end = f"rejected: {reason_kind(tally.reason)}"
        else:
            end = f"{self.read} {file.kind}" + (f".{file.compression}" if file.compression else "")
        self._add(end, 1, size)
        self.found += size
        if unread := tally.unread(size):
            self.unread.append((unread, file.name, tally.reason))

    def _add(self, end: str, files: int, size: int) -> None:
        count = self.ends.setdefault(end, [0, 0])
        count[0] += files
        count[1] += size

    @property
    def unread_bytes(self) -> int:
        return sum(size for size, _, _ in self.unread)

    def refusal(self) -> str | None:
        """Why too much was not read, naming the worst; None where it was not too much."""
        if self.unread_bytes <= max(_MOST_UNREAD * self.found, _LITTLE):
            return None
        worst = sorted(self.unread, key=lambda each: -each[0])
        named = ", ".join(f"{name} ({reason})" for _, name, reason in worst[:_WORST_SHOWN])
        more = f" and {len(worst) - _WORST_SHOWN:,} more" if len(worst) > _WORST_SHOWN else ""
        return f"{self.unread_bytes:,} of {self.found:,} bytes were not read as text: {named}{more}"
