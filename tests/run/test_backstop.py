"""Native code that lets no thread of Python run is ended all the same."""

import subprocess
import sys

from stablelm_jax.run.signals import EXIT_STOPPED

HOLDING = """
import ctypes, sys, time
from pathlib import Path
from stablelm_jax.run import watchdog
watchdog.BACKSTOP_SECONDS = 1.0
stacks = Path(sys.argv[1]) / "hang" / "native.txt"
backstop = lambda: watchdog.Backstop(stacks, "HUNG: native code", watchdog.EXIT_STOPPED)
watched = watchdog.Watchdog(1.0, lambda *_: print("noticed in Python"), backstop)
watched.start(0)
for _ in range(5):  # what is set anew in time does nothing
    time.sleep(0.5)
    watched.moved()
if sys.argv[2] == "holds":
    def in_native_code():
        ctypes.PyDLL(None).sleep(60)  # PyDLL keeps the lock of Python meanwhile
    in_native_code()
watched.stop()
time.sleep(1)
print("still there:", stacks.parent.exists())
"""


def run(folder, does):
    command = [sys.executable, "-c", HOLDING, str(folder), does]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=50)


def test_native_code_that_holds_pythons_lock_leaves_its_stacks_and_75(tmp_path):
    ended = run(tmp_path, "holds")
    assert ended.returncode == EXIT_STOPPED and ended.stdout == "HUNG: native code\n"
    stacks = (tmp_path / "hang" / "native.txt").read_text()
    assert "in_native_code" in stacks and "_watch" in stacks  # all threads


def test_where_nothing_hangs_nothing_is_left(tmp_path):
    ended = run(tmp_path, "nothing")
    assert ended.returncode == 0 and ended.stdout == "still there: False\n"
