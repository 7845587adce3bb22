"""Random numbers that a failed test can be run with again."""

import os
import zlib
from collections import Counter

import numpy as np

_seed = int(os.environ.get("SEED") or np.random.SeedSequence().entropy % 2**32)
_calls = Counter()


def new_rng() -> np.random.Generator:
    """A generator that is new in every session; pytest shows its seed where a test fails.

    SEED=N in the environment gives a test the same numbers again, whatever else is run.
    """
    test = os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0]
    _calls[test] += 1
    print(f"random numbers of SEED={_seed}")
    return np.random.default_rng([_seed, zlib.crc32(test.encode()), _calls[test]])
