"""A checkout with nothing but the scripts, a Python that only takes notes, and its notes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Not a script with `#!python`: such a line cannot name a path with spaces.
FAKE_PYTHON = f'''#!/bin/sh
exec "{sys.executable}" -S "{Path(__file__).parent / "fake_python.py"}" "$@"
'''


class Checkout:
    """`root` is in a folder with spaces; `run` starts a script there from another folder."""

    def __init__(self, folder: Path):
        self.root = folder / "a checkout"
        self.elsewhere = folder / "some where else"
        self.programs = folder / "programs"  # first on the PATH
        self.log = folder / "log.jsonl"
        for made in (self.root, self.elsewhere, self.programs):
            made.mkdir(parents=True)
        shutil.copytree(ROOT / "launch", self.root / "launch")
        shutil.copytree(ROOT / ".ci", self.root / ".ci")
        for name in ("pyproject.toml", "requirements.txt"):
            shutil.copy(ROOT / name, self.root)
        self.add_program("python3", FAKE_PYTHON)
        self.add_program("nvidia-smi", "#!/bin/sh\nexit 9\n")

    def add_program(self, name: str, text: str) -> None:
        path = self.programs / name
        path.write_text(text)
        path.chmod(0o755)

    def command(self, script: str, *arguments: str) -> list[str]:
        return ["bash", str(self.root / script), *arguments]

    def environment(self, **more: str) -> dict[str, str]:
        outside = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "JAX_PLATFORMS")}
        return (
            outside
            | {
                "PATH": f"{self.programs}:{os.environ['PATH']}",
                "FAKE_LOG": str(self.log),
                "FAKE_SELF": str(self.programs / "python3"),
            }
            | more
        )

    def run(self, script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(script, *arguments),
            cwd=self.elsewhere,
            env=self.environment(**more),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self, module: str | None = None) -> list[list[str]]:
        """What was called, in order; only of one module, without its name, if one is given."""
        noted = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [call[1:] for call in noted if call[0] == module] if module else noted

    def installed(self) -> list[list[str]]:
        """The arguments of each `pip install`, but for that of pip itself."""
        calls = [call for call in self.calls("pip") if "pip" not in call]
        return [[a for a in call[1:] if a not in ("--quiet", "--no-compile")] for call in calls]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


@pytest.fixture(scope="module")
def checkout_of_module(tmp_path_factory):
    """One for the tests of a file that look at what a single run did."""
    return Checkout(tmp_path_factory.mktemp("checkout"))
