"""Seconds from a start of `train` to its first step, without and with compiled programs at hand.

    python benchmarks/startup.py --data runs/smoke/data --tokenizer runs/smoke/corpus/tokenizer.json

Of configs/smoke.py, whose data `bash launch/smoke.sh` prepares. What follows goes to `train`. The
held-out loss at step 0 is a wait before the first step too; evaluation.every=0 leaves it out.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/smoke.py")
    parser.add_argument("--data", required=True, help="data.root")
    parser.add_argument("--tokenizer", required=True, help="data.tokenizer")
    parser.add_argument("--rounds", type=int, default=3)
    arguments, given = parser.parse_known_args()
    places = {"root": arguments.data, "tokenizer": arguments.tokenizer}
    fields = [f"--config.data.{name}={place}" for name, place in places.items()]
    given = ["--config", arguments.config, *fields, *given]
    found = {"cold": [], "warm": []}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:  # the cache lies beside the run folders
            for kind, seconds in found.items():
                seconds.append(_start(Path(folder) / kind, given))
    for kind, seconds in found.items():
        print(f"{kind}: first step after {statistics.median(seconds):.1f} s (median), {seconds}")


def _start(workdir: Path, given: list[str]) -> float:
    """Seconds to the end of the first step."""
    command = [sys.executable, "-m", "stablelm_jax.train", "--workdir", str(workdir), *given]
    began, lines = time.time(), []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not any("loss" in line for line in lines):
        if process.poll() is not None:
            raise SystemExit(f"train ended with {process.returncode} before its first step")
        time.sleep(0.02)
        file = workdir / "metrics.jsonl"
        whole = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
        lines = [json.loads(line) for line in whole]
    process.send_signal(signal.SIGTERM)
    process.wait()
    return round(next(line["time"] for line in lines if "loss" in line) - began, 2)


if __name__ == "__main__":
    main()
