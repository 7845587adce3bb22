"""The house keeps its size and its floors: docs/architecture.md says what each room is for.

A room is a folder of `stablelm_jax/`. It imports only rooms at or below its own floor; the core
imports the shell only inside functions, where a run evaluates, samples or draws.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "stablelm_jax"

# Lines at most of all *.py of a room. Most hold more than the design gives them: training 1,750,
# run 900, checkpoint 850, config 750, data 1,500, tokenizer 450, parallel 450, model 660,
# storage 220, preparation 1,700, generation 800, evaluation 1,000, interop 1,700, planning 1,200,
# reporting 700. They may shrink to it and never grow.
# The core, from the top floor down:
CORE = {
    "training": 3368,
    "run": 1691,
    "checkpoint": 1134,
    "config": 1109,
    "data": 1800,
    "tokenizer": 990,
    "parallel": 805,
    "optimizer": 572,
    "model": 961,
    "kernels": 2309,
    "storage": 289,
}
# The shell around it, a single floor.
SHELL = {
    "preparation": 7113,
    "generation": 872,
    "evaluation": 2062,
    "interop": 2387,
    "planning": 1494,
    "reporting": 3144,
    "drilling": 384,
}
ROOMS = CORE | SHELL
CORE_WITHOUT_KERNELS, EVERYTHING = 12719, 34_610


def files_of(room):
    return sorted((PACKAGE / room).rglob("*.py"))


def lines_of(room):
    return sum(path.read_text(encoding="utf-8").count("\n") for path in files_of(room))


def imported_rooms(room, *, everywhere):
    """{(room, file): line} of what its modules import when they load; `everywhere`: or run."""
    found = {}
    for path in files_of(room):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree) if everywhere else _at_load(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                package, _, rest = name.partition(".")
                other = rest.split(".")[0]
                if package == "stablelm_jax" and other in ROOMS and other != room:
                    found[other, str(path.relative_to(ROOT))] = node.lineno
    return found


def _at_load(node):
    """All nodes below that run when the module is loaded: not those of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _at_load(child)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_keeps_to_its_lines(room):
    assert lines_of(room) <= ROOMS[room]


def test_every_folder_of_the_package_is_a_room():
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.glob("*/**/*.py")}
    assert folders == set(ROOMS)


def test_the_core_is_read_in_an_evening():
    assert sum(lines_of(room) for room in CORE if room != "kernels") <= CORE_WITHOUT_KERNELS


def test_the_whole_package_keeps_to_its_lines():
    verbs = (path.read_text(encoding="utf-8").count("\n") for path in PACKAGE.glob("*.py"))
    assert sum(map(lines_of, ROOMS)) + sum(verbs) <= EVERYTHING


@pytest.mark.parametrize("room", CORE)
def test_a_room_of_the_core_imports_only_the_floors_below_it(room):
    floors = list(CORE)
    below = set(floors[floors.index(room) + 1 :])
    at_load = imported_rooms(room, everywhere=False)
    assert not {place: line for place, line in at_load.items() if place[0] not in below}
    later = imported_rooms(room, everywhere=True)
    assert not {p: line for p, line in later.items() if p[0] not in below | set(SHELL)}


def test_the_rooms_of_the_shell_import_one_another_in_no_circle():
    graph = {
        room: {other for other, _ in imported_rooms(room, everywhere=False) if other in SHELL}
        for room in SHELL
    }
    while leaves := {room for room, others in graph.items() if not others & graph.keys()}:
        graph = {room: others for room, others in graph.items() if room not in leaves}
    assert not graph


@pytest.mark.parametrize(
    "room, never",
    [
        ("kernels", set(ROOMS)),  # it knows arrays alone
        ("data", {"model", "kernels", "optimizer"}),
        ("run", {"training"}),
    ],
)
def test_some_rooms_know_nothing_of_others_even_inside_functions(room, never):
    found = imported_rooms(room, everywhere=True)
    assert not {place: line for place, line in found.items() if place[0] in never}


def test_preparation_and_data_meet_in_the_manifest_and_the_shards_only():
    meet = {"stablelm_jax.data.manifest", "stablelm_jax.data.shards"}
    for path in files_of("preparation"):
        text = path.read_text(encoding="utf-8")
        found = set(re.findall(r"^\s*from (stablelm_jax\.data\.\w+) import", text, re.MULTILINE))
        assert found <= meet, path.name
    assert "preparation" not in {room for room, _ in imported_rooms("data", everywhere=True)}


def test_no_page_names_a_module_that_does_not_exist():
    """Written from the top, as in stablelm_jax/plan.py, or from the package, as in data/rows.py."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if page.name == "log.md":  # dated entries tell of what was there
            continue
        text = page.read_text(encoding="utf-8")
        for name in set(re.findall(r"stablelm_jax/[\w/]+\.py", text)):
            assert (ROOT / name).exists(), f"{page.name} names {name}"
        for room, rest in set(re.findall(r"(?<![\w/])(\w+)/([\w/]+\.py)", text)):
            if room in ROOMS:
                assert (PACKAGE / room / rest).exists(), f"{page.name} names {room}/{rest}"


def test_text_is_read_and_written_as_utf_8_whatever_the_locale():
    """Each call that opens a text, a process's output too, names its encoding."""
    opening = re.compile(r"open|.*\.(open|read_text|write_text|fdopen|TextIOWrapper)", re.DOTALL)
    not_text = re.compile(
        r"(os|ts|SavedModel|tokenize|services\.log\.writers|streams|archive|tarfile\.TarFile)\."
    )
    for path in [*files_of("."), *sorted((ROOT / "launch").rglob("*.py"))]:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func)
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            modes = [given.get("mode", ""), *map(ast.unparse, call.args)]
            is_binary = any(re.fullmatch(r"'[rwxa+]*b[rwxa+]*'", mode) for mode in modes)
            opens = opening.fullmatch(name) and not not_text.match(name) and not is_binary
            if opens or given.get("text") == "True":
                named = "encoding" in given or "'utf-8'" in modes
                assert named, f"{path.relative_to(ROOT)}, line {call.lineno}"
