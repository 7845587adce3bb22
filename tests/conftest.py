"""For all tests: eight CPU devices, no network, and an honest account of what did not run."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

# Before jax is imported; child processes inherit these. Whoever has a chip may set JAX_PLATFORMS.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu: do not look for a TPU machine's metadata

# A shell that runs the tests in its background hands down a SIGINT that is ignored, to every child.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests spend most of their time compiling small programs: LLVM may leave those as they are. What is
# computed, and XLA's own passes, stay the same.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# Of the two ways in which XLA's CPU compiler makes code of a fusion, the older one takes a third of
# the time. jaxlib 0.10 still has both, and newer ones end a process that names a flag they lack.
_flags, _flag = os.environ.get("XLA_FLAGS", ""), "--xla_cpu_use_fusion_emitters=false"
if version("jaxlib").startswith("0.10.") and _flag not in _flags:
    os.environ["XLA_FLAGS"] = f"{_flags} {_flag}".strip()

# A run that a test starts again compiles nothing anew, in this process or in a child.
_compiled = tempfile.TemporaryDirectory(prefix="compiled-for-tests-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _compiled.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import fsspec
import jax
import pytest
from fake_gcs import FakeGcs
from hypothesis import settings

# Eight devices stand in for a pod, in this process only: XLA_FLAGS would be inherited, and a verb
# started by a test is to meet the machine as its user does, with one device.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 8)

settings.register_profile("stablelm", deadline=None)  # a first call may compile
settings.load_profile("stablelm")

TESTS = Path(__file__).parent
# Import name -> the extra that brings it.
EXTRA_OF = {
    "torch": "parity",
    "transformers": "parity",
    "megatron": "parity",
    "libtpu": "aot",
    "jax_cuda13_plugin": "aot",
    "accelerate": "parity",
    "peft": "parity",
    "lm_eval": "eval",
    "resiliparse": "demo",
    "gcsfs": "gcs",
    "s3fs": "s3",
    "aiohttp": "http",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "cyllama": "edge",
    "xllamacpp": "edge",
}


@pytest.fixture(scope="session")
def gcs():
    """A Google Cloud Storage of this machine, for this process and its children.

    One for all tests: the drivers keep the first address they meet. A test takes its own bucket.
    """
    server = FakeGcs()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        pytest.importorskip("gcsfs")
        fsspec.config.set_conf_env(fsspec.config.conf)
        yield server
    server.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The tokenizer and sources of tiny.py, which tests read and leave as they are."""
    from tiny import write_data  # late: not every test trains

    return write_data(tmp_path_factory.mktemp("data") / "sources")


# Files of few tests that take long, the longest first.
LONG = ("drilling/test_rounds.py", "test_readme.py", "training/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first: one that is begun last keeps all cores but its own waiting."""

    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(TESTS).as_posix()
        return next((at for at, name in enumerate(LONG) if path.startswith(name)), len(LONG))

    items.sort(key=place)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked `parity` or `aot` is skipped unless its whole extra is installed."""
    for name, extra in EXTRA_OF.items():
        if item.get_closest_marker(extra) and importlib.util.find_spec(name) is None:
            pytest.skip(f"could not import '{name}'")


def pytest_terminal_summary(terminalreporter) -> None:
    """Names what did not run and how to run it: a green line alone would hide that."""
    counts = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        what = "tests" if "::" in report.nodeid else "whole files"
        counts[_why(report.longrepr), what] += 1
    for item in terminalreporter.stats.get("deselected", []):
        if item.get_closest_marker("slow"):
            counts["slow: launch/test.sh --all runs them", "tests"] += 1
    if not counts:
        return
    terminalreporter.section("NOT RUN HERE")
    for (why, what), count in sorted(counts.items()):
        terminalreporter.write_line(f"{count:4} {what}: {why}")


def _why(longrepr) -> str:
    reason = longrepr[2].removeprefix("Skipped: ") if isinstance(longrepr, tuple) else str(longrepr)
    missing = re.match(r"could not import '([\w.]+)'", reason)
    if not missing:
        return reason
    extra = EXTRA_OF.get(missing[1].split(".")[0])
    if extra is None:
        return f"{missing[1]} is not installed"
    how = "launch/test.sh --all" if extra in ("parity", "aot") else f"pip install -e '.[{extra}]'"
    return f"{missing[1]} is not installed (extra {extra}: {how})"
