"""Compiled programs kept from one start of a run to the next, beside the run folder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import jax

from stablelm_jax.checkpoint.names import checkpoint_path

_HIT = "/jax/compilation_cache/cache_hits"
_MISS = "/jax/compilation_cache/cache_misses"


class CompilationCache:
    """jax's persistent cache, on unless the user has set one up; counts what it gave.

    Runs whose folders lie side by side share it. Attributes: folder, hits, misses.
    """

    def __init__(self, workdir: str | os.PathLike[str]):
        self.hits = self.misses = 0
        self.folder = jax.config.jax_compilation_cache_dir
        if not self.folder:
            parent = checkpoint_path(workdir).parent  # jax, too, writes to gs://
            self.folder = str(parent / ".compilation_cache" / _machine())
            jax.config.update("jax_compilation_cache_dir", self.folder)
            # What compiles within a second is not worth a file on a disk that many hosts share.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
        jax.monitoring.register_event_listener(self._count)

    def _count(self, event: str, **_: object) -> None:
        self.hits += event == _HIT
        self.misses += event == _MISS

    def __str__(self) -> str:
        return f"{self.hits} programs from {self.folder}, {self.misses} compiled"


def _machine() -> str:
    """The kind of device; a program for one CPU may hold instructions that another lacks."""
    kind = jax.devices()[0].device_kind.replace(" ", "_")
    if jax.default_backend() != "cpu":
        return kind
    return f"cpu_{hashlib.sha256(_cpu().encode()).hexdigest()[:8]}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return ""
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
