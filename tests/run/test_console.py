"""A verb and its terminal: what cannot be shown never ends the work, Ctrl-C always does."""

import ast
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.panel import Panel
from rich.table import Table

from stablelm_jax.run.console import make_console
from stablelm_jax.run.events import Events

PACKAGE = Path(__file__).parents[2] / "stablelm_jax"
SCRIPT = """
import os, sys, threading, time, warnings
from stablelm_jax.run_verb import *; from stablelm_jax.run.console import *
def main():
    {body}
    open({work!r}, "w", encoding="utf-8").write("done")
run_verb(main, "verb", **{options})
"""
MANY = 'for number in range(2000): print("é" * 100, number)'


@pytest.fixture
def script(tmp_path):
    """f(body, **options of run_verb) -> (command, the file that is there once its work is done)."""

    def write(body, **options):
        path, work = tmp_path / "verb.py", tmp_path / "work"
        body = body.replace("\n", "\n    ")
        path.write_text(SCRIPT.format(body=body, work=str(work), options=options), "utf-8")
        return [sys.executable, str(path)], work

    return write


def run(command, shell="", **environment):
    """Runs a command in a shell with redirections; gives its exit code and what it printed."""
    return subprocess.run(
        ["bash", "-c", f'"$@" {shell}; exit ${{PIPESTATUS[0]}}', "-", *command],
        env=os.environ | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


@pytest.mark.parametrize(
    "shell", ["| head -n 1", "| true", ">/dev/full", ">/dev/full 2>&1", ">&-", ">&- 2>&- <&-"]
)
def test_work_goes_on_when_nobody_can_read_its_output(script, shell):
    command, work = script(MANY)
    done = run(command, shell)
    assert done.returncode == 0 and done.stderr == ""
    assert work.exists()


def test_work_goes_on_when_the_reader_stops_reading(script):
    command, work = script("import stablelm_jax.run_verb as c; c._STALL_SECONDS = 0.1\n" + MANY)
    reading, writing = os.pipe()
    done = subprocess.run(command, stdout=writing, timeout=120)
    os.close(reading), os.close(writing)
    assert done.returncode == 0 and work.exists()


@pytest.mark.parametrize(
    "shell, code, error",
    [
        ("| head -n 1", 0, ""),
        (">/dev/full", 1, "error: stdout cannot be written: No space left on device\n"),
    ],
)
def test_a_verb_whose_result_is_its_output_ends_where_the_output_does(script, shell, code, error):
    command, work = script(MANY, prints_result=True)
    done = run(command, shell)
    assert (done.returncode, done.stderr) == (code, error)
    assert not work.exists()


def test_a_result_that_is_lost_in_its_last_bytes_is_an_error(script):
    command, _ = script('print("short")', prints_result=True)
    assert run(command, ">/dev/full").returncode == 1
    assert run(command, "| (sleep 1; true)").returncode == 0
    failed, _ = script('print("short"); return 3', prints_result=True)
    assert run(failed, ">/dev/full", PYTHONUNBUFFERED="").returncode == 3


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_letters_that_the_terminal_lacks_are_written_as_escapes(script, encoding):
    command, work = script('print("Ж \\udce9"); print("Ж", file=sys.stderr)')
    done = run(command, "2>&1", PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and work.exists()
    assert "\\u0416 \\udce9" in done.stdout and done.stdout.count("\\u0416") == 2


def test_a_run_keeps_in_its_events_once_that_output_was_lost(script, tmp_path):
    body = """
tell_losses(lambda text: open("told", "a", encoding="utf-8").write(text + "\\n"))
for _ in range(5): print("Ж", flush=True)
for _ in range(5): print("Ж", flush=True, file=sys.stderr)
"""
    command, _ = script(body)
    command = ["env", "-C", str(tmp_path), *command]
    run(command, ">/dev/full", PYTHONIOENCODING="ascii")
    told = (tmp_path / "told").read_text(encoding="utf-8").splitlines()
    assert len(told) == 2
    assert "ascii" in told[0] and "No space left on device" in told[1]


def test_what_was_lost_before_the_run_had_a_folder_is_told_to_it_too(script):
    command, _ = script('print("x", flush=True)\ntell_losses(lambda t: print(t, file=sys.stderr))')
    assert "stdout cannot be written" in run(command, ">/dev/full").stderr


def test_an_event_that_is_kept_is_not_printed(tmp_path, capsys):
    Events(make_console(), tmp_path / "events.jsonl").keep("output_lost", "gone", step=3)
    assert '"step": 3' in (tmp_path / "events.jsonl").read_text(encoding="utf-8")
    assert capsys.readouterr().out == ""


def test_square_brackets_and_names_between_colons_are_text(capsys):
    odd = "lr[a] x[/y] :smile: [red]q["
    console, table = make_console(file_width=200), Table("name", title=odd)
    table.add_row(odd)
    console.print(odd)
    console.print(table)
    console.print(Panel(odd))
    console.rule(odd)
    assert capsys.readouterr().out.count(odd) == 5


SWALLOWED = """
class Loud:
    def __del__(self):
        print("swallowing", flush=True)
        time.sleep(60)
Loud()
time.sleep(60)
"""
NATIVE = """
import numpy as np
noise = np.random.default_rng(0).normal(size=(6000, 6000))
print("ready", flush=True)
np.linalg.eigvals(noise)
"""


WAITING = 'print("ready", flush=True); time.sleep(60)'
TURNED = f"""
try:
    {WAITING}
except KeyboardInterrupt:
    raise ImportError("what an extension makes of it") from None
"""


def interrupted(command):
    """(exit code, stderr, seconds to the end) of a command that gets Ctrl-C at its first line."""
    verb = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    verb.stdout.readline()
    time.sleep(0.2)
    began = time.monotonic()
    verb.send_signal(signal.SIGINT)
    _, error = verb.communicate(timeout=60)
    return verb.returncode, error, time.monotonic() - began


@pytest.mark.parametrize("body", [WAITING, SWALLOWED, TURNED, NATIVE])
def test_ctrl_c_is_one_line_and_130_whatever_goes_on(script, body):
    soon = "import stablelm_jax.run_verb as c; c._GRACE_SECONDS = 0.5\n"
    command, work = script(soon + body, interrupted="nothing was written")
    code, error, seconds = interrupted(command)
    assert code == 130 and seconds < 30
    assert error == "verb: interrupted; nothing was written\n"
    assert not work.exists()


def test_ctrl_c_while_libraries_are_imported_ends_at_once(script, tmp_path):
    """Native code of jax crashes where its import is cut short; others swallow the error."""
    swallowing = WAITING.replace(";", "\ntry:") + "\nexcept KeyboardInterrupt: time.sleep(60)"
    (tmp_path / "slow.py").write_text(f"import time\n{swallowing}")
    command, work = script("import slow")
    code, error, seconds = interrupted(command)
    assert error.count("\n") == 1 and code == 130
    assert seconds < 4 and not work.exists()


def test_a_second_ctrl_c_does_not_end_the_cleaning_up(script):
    body = """
try:
    print("ready", flush=True)
    time.sleep(60)
finally:
    print("cleaning", flush=True)
    time.sleep(1)
    print("clean", flush=True)
"""
    verb = subprocess.Popen(script(body)[0], stdout=subprocess.PIPE, encoding="utf-8")
    for _ in range(2):
        verb.stdout.readline()
        verb.send_signal(signal.SIGINT)
    assert verb.communicate(timeout=60)[0] == "clean\n" and verb.returncode == 130


def test_a_verb_that_answers_ctrl_c_itself_goes_on_as_often_as_it_comes(script):
    body = """
answer_interrupts()
for _ in range(2):
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        pass
"""
    command, work = script("import stablelm_jax.run_verb as c; c._GRACE_SECONDS = 0.1\n" + body)
    verb = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    for _ in range(2):
        verb.stdout.readline()
        time.sleep(0.2)
        verb.send_signal(signal.SIGINT)
    assert verb.wait(60) == 0 and work.exists()


def test_a_ctrl_c_that_such_a_verb_leaves_unanswered_is_one_line_and_130(script):
    command, _ = script("answer_interrupts()\n" + WAITING)
    verb = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    verb.stdout.readline()
    time.sleep(0.2)
    verb.send_signal(signal.SIGINT)
    assert verb.communicate(timeout=60)[1].count("\n") == 1 and verb.returncode == 130


def test_a_crash_in_native_code_leaves_the_stacks(script):
    done = run(script("import ctypes; ctypes.string_at(0)")[0])
    assert "Segmentation fault" in done.stderr and "in main" in done.stderr


def test_a_terminal_that_has_gone_does_not_end_the_work(script):
    body = 'import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\nprint("up")\ntime.sleep(1)'
    command, work = script(body + '\nprint("x" * 10_000, flush=True); input() if 0 else None')
    ours, theirs = pty.openpty()
    verb = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.read(ours, 2)
    os.close(ours)
    assert verb.wait(60) == 0 and work.exists()


def test_every_verb_begins_with_the_guard():
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if '__name__ == "__main__"' in text and path.name != "__main__.py":
            assert "    run_verb(" in text.split('__name__ == "__main__"')[-1], path.name


def test_every_console_is_made_in_one_place():
    for path in sorted(PACKAGE.rglob("*.py")):
        if "onsole" not in path.read_text(encoding="utf-8"):
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_bytes())) if type(node) is ast.Call]
        names = {ast.unparse(call.func) for call in calls}
        assert path.name == "console.py" and path.parent.name == "run" or "Console" not in names
        assert not {"Text.from_markup", "rich.print", "escape"} & names, path.name
