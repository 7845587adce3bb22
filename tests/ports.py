"""Ports on which a test may listen."""

import random
import socket

# Below what Linux gives to outgoing connections (from 32768 on) and what SLURM gives to jax: a port
# of those may be free when it is looked at and taken a moment later.
_FIRST, _LAST = 20_000, 32_000


def free_port() -> int:
    """One with a free one after it: jax's, and that of the meeting of processes before it."""
    for port in random.SystemRandom().sample(range(_FIRST, _LAST), 100):
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("", port))
                two.bind(("", port + 1))
            except OSError:
                continue
            return port
    raise OSError(f"no two free ports among 100 of {_FIRST} to {_LAST}")
