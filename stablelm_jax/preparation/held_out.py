"""Which documents are held out from training: those whose content hash lies below a threshold.

So copies of a document are all on the same side, and adding documents to a source moves few others.
The threshold is fixed by a first look at the beginning of the source, before anything is tokenised;
then each chunk of the input can be split by itself, in one pass.
docs/data.md says how many, and what this gives.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from stablelm_jax.preparation.chunks import Chunk, read_chunk
from stablelm_jax.preparation.formats import Reading
from stablelm_jax.preparation.keeping import Keep, for_all, for_source
from stablelm_jax.preparation.tokenised import TokenisedReader

ENOUGH_DOCUMENTS = 50
ENOUGH_BYTES = 256_000
MOST_DOCUMENTS = 0.05
MAX_FRACTION = 0.25  # what `--held-out` may ask for
_MOST_TEXT = 0.25
_MARGIN = 1.25
_LOOK_BYTES = 256 << 20
_LOOK_DOCUMENTS = 1_000
FEW_DOCUMENTS = 200  # fewer than ten of them are held out
_LOOK_DOCUMENTS_MOST = 100_000
# Of a source that is a small part of its files the look goes no further than these bytes of them,
# once it has seen so many documents: the Pile's smallest parts would take it through a tenth.
_LOOK_INPUT_BYTES, _LOOK_KEPT_DOCUMENTS = 1 << 30, 100


def content_hash(data: bytes) -> int:
    """64 bits of BLAKE2b of a document's UTF-8 text."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def hash_of(document: str) -> int:
    """The hash that decides about a document: of its text, or of its topic where it has one."""
    return content_hash(getattr(document, "topic", document).encode())


class HeldOutRule(NamedTuple):
    """Says of a content hash whether the document is held out."""

    threshold: int  # documents of a smaller hash are held out, 0 to 2**64
    passed_over: Sequence[int]  # hashes below the threshold that are not held out all the same
    reason: str  # how the threshold was found, for people

    def holds_out(self, value: int) -> bool:
        return value < self.threshold and value not in self.passed_over


@dataclasses.dataclass
class Look:
    """What the first look saw of a source."""

    # content hash: [copies, bytes of text of all copies]
    found: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    share: float = 1.0  # how much of the input was read, 0 to 1
    whole: bool = True  # whether nothing follows
    text_bytes: int = 0

    def add(self, text: str) -> None:
        """Adds a document."""
        size = len(text.encode())
        self.text_bytes += size
        copies = self.found.setdefault(hash_of(text), [0, 0])
        copies[0] += 1
        copies[1] += size

    def is_enough(self, kept_from: int) -> bool:
        """Whether it may end here; `kept_from`: bytes of the files read, of a part of them."""
        documents = len(self.found)
        is_long = self.text_bytes >= _LOOK_BYTES and documents >= _LOOK_DOCUMENTS
        is_far = kept_from >= _LOOK_INPUT_BYTES and documents >= _LOOK_KEPT_DOCUMENTS
        return is_long or is_far or documents >= _LOOK_DOCUMENTS_MOST


def look(
    chunks: Sequence[Chunk],
    reading: Reading,
    usable: Callable[[str], bool] = lambda text: True,
    ids: TokenisedReader | None = None,
) -> Look:
    """Reads a source from its beginning, as far as the threshold needs it.

    That is 256 MiB of text and 1,000 different documents, or 100,000 of them, or everything.
    """
    return look_at_several(chunks, reading, [reading.keep], usable, ids)[0]


def look_at_several(
    chunks: Sequence[Chunk],
    reading: Reading,
    keeps: Sequence[Keep | None],
    usable: Callable[[str], bool] = lambda text: True,
    ids: TokenisedReader | None = None,
) -> list[Look]:
    """The first look at several sources in the same files, one for each of `keeps`."""
    reading, earlier_bytes = reading._replace(keep=for_all(keeps)), 0
    looks = [Look() for _ in keeps]
    for chunk in chunks:
        for record in read_chunk(chunk, reading, ids=ids):
            consumed = earlier_bytes + record.consumed
            for keep, seen in zip(keeps, looks):
                text = for_source(record.content, keep)
                if seen.whole and isinstance(text, str) and usable(text):
                    seen.add(text)
                    if seen.is_enough(consumed if keep else 0):
                        # Some servers tell no size: then nothing is known of what follows.
                        total = max(consumed, sum(chunk.size for chunk in chunks))
                        seen.share, seen.whole = consumed / total, False
            if not any(seen.whole for seen in looks):
                return looks
        earlier_bytes += chunk.size
    return looks


def choose(seen: Look, fraction: float, by_topic: bool = False) -> HeldOutRule:
    """The rule for a source, of which at least `fraction` of the text is to be held out.

    `by_topic`: what is held out follows from the topics alone, so sources that share them agree;
    ValueError where that is no topic.
    """
    if by_topic:
        threshold = int(fraction * 2**64)
        if seen.whole and seen.found and min(seen.found) >= threshold:
            raise ValueError(_no_topic(fraction, min(seen.found) / 2**64))
        return HeldOutRule(threshold, [], f"topics of hashes in the lowest {fraction:.3%}")
    return _smallest_hashes(seen.found, fraction) if seen.whole else _by_share(seen, fraction)


def _no_topic(fraction: float, lowest: float) -> str:
    enough = math.floor(lowest * 1000 + 1) / 1000
    remedy = f"give --held-out {enough:g}, to every source that shares these values"
    if enough > MAX_FRACTION:
        remedy = "add records of other values, or do without --held-out-by"
    return f"--held-out {fraction:g} holds out no value of --held-out-by: {remedy}"


def _smallest_hashes(found: dict[int, list[int]], fraction: float) -> HeldOutRule:
    """The documents of smallest hash, exactly as many as are enough.

    A document is passed over if with it too many documents (its copies count) or too much of the
    text would be held out. If that leaves none, the document of least text is held out.
    """
    documents, text_bytes = (sum(column) for column in zip((0, 0), *found.values()))
    most_documents = max(1, int(max(MOST_DOCUMENTS, fraction) * documents))
    most_bytes = max(_MOST_TEXT, 2 * fraction) * text_bytes
    enough_bytes = max(ENOUGH_BYTES, fraction * text_bytes)
    chosen, held_documents, held_bytes = [], 0, 0
    for value, (copies, size) in sorted(found.items()):
        if held_documents >= ENOUGH_DOCUMENTS and held_bytes >= enough_bytes:
            break
        if held_documents + copies <= most_documents and held_bytes + size <= most_bytes:
            chosen.append(value)
            held_documents += copies
            held_bytes += size
    if not chosen and len(found) > 1:
        chosen = [min(found, key=lambda value: (found[value][1], value))]
    threshold = chosen[-1] + 1 if chosen else 0
    passed_over = sorted({value for value in found if value < threshold}.difference(chosen))
    reason = f"the smallest hashes of all {documents:,} documents"
    return HeldOutRule(threshold, passed_over, reason)


def _by_share(seen: Look, fraction: float) -> HeldOutRule:
    """Every hash below a share of all hashes, after an estimate of how much the whole source holds.

    The share would give 1.25 times enough: how many documents it really gives varies by the square
    root of their number.
    """
    documents = len(seen.found) / seen.share
    text_bytes = sum(size for _, size in seen.found.values()) / seen.share
    enough = _MARGIN * max(ENOUGH_DOCUMENTS / documents, ENOUGH_BYTES / text_bytes)
    share = max(fraction, min(MOST_DOCUMENTS, enough))
    reason = f"hashes in the lowest {share:.3%}, for about {documents:,.0f} documents"
    return HeldOutRule(int(share * 2**64), [], reason)
