"""How XLA compiles the programs of a run, and where they are kept from one start to the next."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import jax
from jax._src import cache_key  # what a program is found by has no public name

from stablelm_jax.checkpoint.names import checkpoint_path


def make_deterministic() -> None:
    """The same bits from the same operation each time, on a GPU too.

    Call it before jax looks for its devices: XLA reads `XLA_FLAGS` once, then.
    """
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{given} --xla_gpu_deterministic_ops=true".strip()


class CompilationCache:
    """jax's persistent cache, unless the user has set one up already; counts what it gave.

    Runs whose folders lie side by side share it. Attributes: folder, hits, misses.
    """

    def __init__(self, workdir: str | os.PathLike[str]):
        self.hits = self.misses = 0
        self.folder = jax.config.jax_compilation_cache_dir
        if not self.folder:
            parent = checkpoint_path(workdir).parent  # jax writes to gs:// too
            self.folder = str(parent / ".compilation_cache" / _machine())
            jax.config.update("jax_compilation_cache_dir", self.folder)
            # What compiles within a second is not worth a file on a disk that many hosts share; on
            # a CPU that is half of what a start compiles.
            least = 0.1 if jax.default_backend() == "cpu" else 1.0
            jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
        if jax.default_backend() == "cpu" and jax.process_count() > 1:
            # Process 0 alone writes, and on CPUs a key holds a fingerprint in which each process
            # marks itself: the others would find nothing. The kind of each device says enough.
            cache_key._hash_accelerator_config = cache_key._hash_devices
        jax.monitoring.register_event_listener(self._count)

    def _count(self, event: str, **_: object) -> None:
        self.hits += event == "/jax/compilation_cache/cache_hits"
        self.misses += event == "/jax/compilation_cache/cache_misses"

    def __str__(self) -> str:
        return f"programs: {self.hits} from {self.folder}, {self.misses} compiled"


def _machine() -> str:
    """The kind of device; a program for one CPU may hold instructions that another lacks."""
    if jax.default_backend() != "cpu":
        return jax.devices()[0].device_kind.replace(" ", "_")
    cpu = ""
    with contextlib.suppress(OSError):  # only Linux has this file
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = "\n".join(sorted({x for x in lines if x.startswith(("model name", "flags"))}))
    return f"cpu_{hashlib.sha256(cpu.encode()).hexdigest()[:8]}"
