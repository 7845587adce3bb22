"""Stands in for `python3` under the launch scripts: notes each call and does little.

Calls that say `-c` go to the real Python. `-m venv DIR` copies FAKE_SELF, the program that starts
this file, to DIR/bin/python. All calls of modules and
scripts are noted in FAKE_LOG, a JSON list a line.
`train` makes the checkpoints global_step<N> for the numbers in FAKE_STEPS and exits with
FAKE_TRAIN_EXIT; with FAKE_TRAIN_EXIT=signal it waits for a signal, notes it and exits with 75, as
the real one does.
"""

import json
import os
import pathlib
import shutil
import signal
import sys
import time

ARGUMENTS = sys.argv[1:]


def note(entry):
    with open(os.environ["FAKE_LOG"], "a") as log:
        log.write(json.dumps(entry) + "\n")


def make_venv(folder):
    python = pathlib.Path(folder, "bin", "python")
    python.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(os.environ["FAKE_SELF"], python)


def value_of(flag):
    return ARGUMENTS[ARGUMENTS.index(flag) + 1]


def train():
    for step in os.environ.get("FAKE_STEPS", "100").split():
        path = pathlib.Path(value_of("--workdir"), "checkpoints", f"global_step{step}")
        path.mkdir(parents=True, exist_ok=True)
    code = os.environ.get("FAKE_TRAIN_EXIT", "0")
    if code == "signal":
        wait_for_a_signal()
    return int(code)


def wait_for_a_signal():
    def stopped(number, frame):
        time.sleep(0.3)  # saving takes a while: the script must wait for it
        note(["signal", signal.Signals(number).name])
        sys.exit(75)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stopped)
    note(["training"])
    time.sleep(30)


def main():
    if ARGUMENTS[0] == "-c":
        if "version_info < (3, 11)" in ARGUMENTS[1] and os.environ.get("FAKE_TOO_OLD"):
            return 1
        os.execv(sys.executable, [sys.executable, *ARGUMENTS])
    if ARGUMENTS[:2] == ["-m", "venv"]:
        make_venv(ARGUMENTS[-1])
    if ARGUMENTS[1:3] != ["pip", "--version"]:
        note(ARGUMENTS[1:] if ARGUMENTS[0] == "-m" else ARGUMENTS)
    if ARGUMENTS[1] == "pip" and os.environ.get("FAKE_PIP_FAILS"):
        return 1
    return train() if ARGUMENTS[1] == "stablelm_jax.train" else 0


if __name__ == "__main__":
    sys.exit(main())
