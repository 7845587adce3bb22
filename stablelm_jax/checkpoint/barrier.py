"""Where all processes wait for each other in a save, and hear that it has failed on one of them."""

from __future__ import annotations

import contextlib
import socket
import threading

import jax
from jax._src.distributed import global_state  # its key-value store has no public name

_KEYS = "stablelm_jax/save"
_SECONDS = 600.0  # for the others to come to a barrier at which a failure is told


class FailedElsewhere(Exception):
    """Another process could not write its part; the text names it and says why."""


class SaveBarrier:
    """What Orbax calls where every process must have come as far: once written, once renamed.

    A process that fails says so, and then comes to the barrier at which the others wait; left alone
    they would wait until the time of the save is over. Each try to save has barriers of its own:
    who still waits at one of an older try is not counted.
    """

    def __init__(self) -> None:
        self._save = self._passed = 0

    def begin(self) -> None:
        """The next save begins, on every process alike."""
        self._save, self._passed = self._save + 1, 0

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits for all; FailedElsewhere where a process came here because it had failed.

        `key`, Orbax's own name of the place, is the same for the next try.
        """
        self._wait(self._save, self._passed, timeout_ms)
        self._passed += 1
        if told := global_state.client.key_value_dir_get(f"{_KEYS}{self._save}/"):
            raise FailedElsewhere("; ".join(text for _, text in sorted(told)))

    def fail(self, cause: str) -> None:
        """Tells the others that this save has failed here; does not wait for them."""
        if jax.process_count() == 1:
            return
        index = jax.process_index()
        key, text = f"{_KEYS}{self._save}/{index}", f"process {index} ({socket.gethostname()})"
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            global_state.client.key_value_set(key, f"{text}: {cause}", allow_overwrite=True)
            arguments = (self._save, self._passed, int(1000 * _SECONDS))
            threading.Thread(target=self._wait, args=arguments, daemon=True).start()

    def _wait(self, save: int, place: int, timeout_ms: int) -> None:
        global_state.client.wait_at_barrier(f"{_KEYS}{save}-{place}", timeout_ms)
