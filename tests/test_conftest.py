"""What is skipped is counted aloud: the last lines of a test run."""

import subprocess
import sys
from pathlib import Path

TESTS = """
import jax, pytest

def test_there_are_eight_devices():
    assert len(jax.devices()) == 8

def test_children_have_the_machines_devices():
    import subprocess, sys
    code = "import jax; print(len(jax.devices()))"
    assert subprocess.check_output([sys.executable, "-c", code]) == b"1\\n"

@pytest.mark.slow
def test_slow(): pass

def test_reader(): pytest.importorskip("no_such_package.reader")

@pytest.mark.aot
def test_aot(): pass
"""


def test_skipped_and_slow_tests_are_counted_with_the_way_to_run_them(tmp_path, monkeypatch):
    here = Path(__file__).parent
    conftest = (here / "conftest.py").read_text()
    # Packages that no machine has, in the places of the extras' own.
    conftest = conftest.replace('"torch"', '"no_torch_here"').replace('"libtpu"', '"no_libtpu"')
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_torch.py").write_text("import pytest\npytest.importorskip('no_torch_here')\n")
    for name in ("JAX_PLATFORMS", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    command = ["pytest", "-c", str(here.parent / "pyproject.toml"), "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    account = done.stdout.partition("NOT RUN HERE")[2]
    assert done.returncode == 0 and account, done.stdout
    torch = "1 whole files: no_torch_here is not installed (extra parity: launch/test.sh --all)"
    assert torch in account
    assert "1 tests: no_libtpu is not installed (extra aot: launch/test.sh --all)" in account
    assert "1 tests: no_such_package.reader is not installed\n" in account
    assert "1 tests: slow: launch/test.sh --all runs them" in account
