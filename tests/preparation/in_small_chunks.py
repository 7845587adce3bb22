"""`prepare` with chunks of a few kilobytes, slowed down where files get their names.

Run by the tests of `prepare` in its place. Workers import the main module of the process that
starts them, so what is set here holds in all of them.

Environment:
  CHUNKS_BYTES: of a chunk (default 40,000).
  CHUNKS_DELAY: seconds of sleep before and after each rename (default 0).
  CHUNKS_KILL_WORKER: a file; the first worker that finishes an output while it is there removes
    it and kills itself.
"""

import os
import pathlib
import signal
import sys
import time

from stablelm_jax import prepare
from stablelm_jax.preparation import chunks, tokenize_chunk

chunks._MIN_CHUNK_BYTES = int(os.environ.get("CHUNKS_BYTES", "40000"))
chunks._CHUNKS_PER_SOURCE = 10**9

_DELAY = float(os.environ.get("CHUNKS_DELAY", "0"))
_KILL = os.environ.get("CHUNKS_KILL_WORKER")


def slowly(move):
    def moved(*arguments, **options):
        time.sleep(_DELAY)
        move(*arguments, **options)
        time.sleep(_DELAY)

    return moved


def deadly(close):
    def closed(*arguments, **options):
        if os.path.exists(_KILL):
            pathlib.Path(_KILL).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        close(*arguments, **options)

    return closed


if _DELAY:
    os.rename, os.replace = slowly(os.rename), slowly(os.replace)
if _KILL:
    tokenize_chunk.OutputWriter.close = deadly(tokenize_chunk.OutputWriter.close)

if __name__ == "__main__":
    sys.exit(prepare.main())
