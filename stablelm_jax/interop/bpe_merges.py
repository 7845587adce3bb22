"""A byte-level BPE that was published as ranks alone, as a list of merges and spelled tokens.

tiktoken joins whichever neighbours make the token of lowest rank; Hugging Face `tokenizers` and
llama.cpp join listed pairs, the earliest in the list first, the leftmost of equals. Both do the
same when the list holds, in order of rank, the last pair that each token is made of.

Why one pair a token is enough: a token anywhere in a text was joined from its own bytes, in the
order in which those bytes are joined when they stand alone, because a join across its ends would
have kept it from coming about. So its last pair is always the same one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

Pair = tuple[bytes, bytes]


def merges(ranks: Mapping[bytes, int]) -> list[Pair]:
    """The pair that makes each token of two bytes or more, in order of rank.

    Raises:
      ValueError: a token that its own bytes never become: no list of pairs can express it.
    """
    in_order = sorted(ranks, key=ranks.__getitem__)
    return [_last_pair(ranks, token) for token in in_order if len(token) > 1]


def _last_pair(ranks: Mapping[bytes, int], token: bytes) -> Pair:
    parts = [token[i : i + 1] for i in range(len(token))]
    joined = [ranks.get(left + right, math.inf) for left, right in zip(parts, parts[1:])]
    while len(parts) > 2:
        lowest = min(joined)
        if lowest >= ranks[token]:
            raise ValueError(
                f"the ranks never join {token!r} (rank {ranks[token]}), only up to {parts}: "
                "they are no byte-pair encoding that other engines could run"
            )
        first = joined.index(lowest)
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
        del joined[first]
        for i in range(max(first - 1, 0), min(first + 1, len(joined))):
            joined[i] = ranks.get(parts[i] + parts[i + 1], math.inf)
    left, right = parts
    return left, right
