"""`prepare --executor slurm` and `ray`, for real: the same bytes as `local`.

pytest -m by_hand tests/launch/test_real_executors.py, with Debian's slurm-wlm and munge, and ray.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import real_slurm
from tiny import write_tokenizer

pytestmark = pytest.mark.by_hand
SMALL_CHUNKS = Path(__file__).parents[1] / "preparation" / "in_small_chunks.py"


def prepare(folder, output, *flags, environment=None):
    """Prepares the source `words` in a process of its own; returns {file: sha256} of it."""
    command = [sys.executable, SMALL_CHUNKS, "--source", "words", "--input", folder / "words.jsonl"]
    command += ["--output", output, "--tokenizer", folder / "tokenizer.json", "--workers", "2"]
    done = subprocess.run(
        [*map(str, command), *flags], env=environment, cwd=real_slurm.ROOT, timeout=280,
        capture_output=True, encoding="utf-8",
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stderr + done.stdout
    files = [path for path in sorted((output / "words").rglob("*")) if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A folder with documents for several chunks, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("local")
    write_tokenizer(folder / "tokenizer.json")
    with open(folder / "words.jsonl", "w", encoding="utf-8") as file:
        for number in range(3000):
            words = " ".join(f"w{(number * step) % 111}" for step in range(1, 20))
            file.write(json.dumps({"text": words}) + "\n")
    made = prepare(folder, folder / "data")
    assert len([name for name in made if name.startswith("train")]) > 2, "several chunks"
    return folder, made


@pytest.mark.skipif(bool(real_slurm.missing()), reason="needs Debian's slurm-wlm and munge")
def test_tasks_of_slurm_give_the_same_bytes(local, tmp_path):
    folder, made = local
    slurm = real_slurm.Slurm(tmp_path)
    try:
        slurm.start()
        flags = ("--executor", "slurm", "--slurm-partition", "main", "--slurm-time", "0:10:00")
        found = prepare(folder, tmp_path / "data", *flags, environment=slurm.environment)
    finally:
        slurm.stop()
    assert found == made


def test_tasks_of_ray_give_the_same_bytes(local, tmp_path):
    pytest.importorskip("ray")
    folder, made = local
    assert prepare(folder, tmp_path / "data", "--executor", "ray") == made
