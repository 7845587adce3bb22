"""The smoke run's corpus: what every installation holds, the same at every call."""

import importlib.metadata
import importlib.util
import json
import pathlib
import sys
import sysconfig

import pytest
import smoke_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    smoke_corpus.write(folder, ["stdlib_code"])
    return folder


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def test_the_code_is_the_standard_library_without_tests_and_installed_packages(corpus):
    rows = read(corpus / "stdlib_code.jsonl")
    names = [row["id"] for row in rows]
    assert {"argparse.py", "json/decoder.py", "asyncio/base_events.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or "test" in name.split("/")[:-1]]
    assert names == sorted(names, key=lambda name: name.split("/"))
    assert len(rows) > 400
    assert sum(len(row["text"]) for row in rows) > 5_000_000
    source = pathlib.Path(sysconfig.get_path("stdlib"), "argparse.py").read_text(encoding="utf-8")
    assert next(row["text"] for row in rows if row["id"] == "argparse.py") == source


def test_sources_that_python_would_not_take_or_that_are_empty_are_left_out(tmp_path, monkeypatch):
    for name, data in {
        "good.py": b"x = 1\n",
        "latin.py": '# coding: latin-1\nname = "Grün"\n'.encode("latin-1"),
        "bad_bytes.py": b"# caf\xe9\n",
        "bad_coding.py": b"# coding: nonsense\n",
        "empty.py": b"",
        "site-packages/other.py": b"x = 1\n",
        "lib2to3/tests/data/py.py": b"x = 1\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / ".#lock.py").symlink_to("nowhere")  # as an editor leaves them
    (tmp_path / "folder.py").mkdir()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert dict(smoke_corpus.stdlib_code()) == {
        "good.py": "x = 1\n",
        "latin.py": '# coding: latin-1\nname = "Grün"\n',
    }


DOCSTRINGS = '''"""Return the  :class:`~a.Thing` of ``x``,
without *any* markup.

    >>> code(1)

Parameters
----------
x : array_like
    It may be of any size.

Return the  :class:`~a.Thing` of ``x``, without *any* markup.
"""
def f():
    """the ``f(x) = x`` + 1 of `it <https://a.b>`_."""
    async def g():
        """It holds 1, 2, 3, 4 and 5.

        If the name is `None <n>`__, the second paragraph is kept as well.
        """
'''


def test_of_docstrings_english_sentences_are_kept_once_and_without_markup(tmp_path, monkeypatch):
    for name in ("b.py", "a.py", "tests/c.py", "test/d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(DOCSTRINGS if name == "b.py" else '"""It is a second file."""')
    (tmp_path / "old.py").write_text('"""Print it as Python 2 has it."""\nprint "it"\n')
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(smoke_corpus.pydoc_data.topics, "topics", {"if": "The topic of a help."})
    assert list(smoke_corpus.python_docs()) == [
        ("a.py", "It is a second file.\n"),
        ("b.py", "Return the Thing of x, without any markup.\n"),
        ("b.py", "If the name is None, the second paragraph is kept as well.\n"),
        ("pydoc_data/topics.py", "The topic of a help.\n"),
    ]


def test_the_packages_are_those_of_every_installation(monkeypatch):
    names = smoke_corpus._PACKAGES
    assert all(importlib.util.find_spec(name) for name in names)
    needed = " ".join(importlib.metadata.requires("stablelm_jax")).lower().replace("-", "_")
    assert not [name for name in names if name != "fontTools" and name not in needed]
    assert "fonttools" in " ".join(importlib.metadata.requires("matplotlib"))
    monkeypatch.setattr(smoke_corpus, "_PACKAGES", ("jinja2", "no_such_package", "orbax"))
    documents = list(smoke_corpus.package_docs())
    paths = {path for path, _ in documents}
    assert {"jinja2/lexer.py", "orbax/checkpoint/checkpoint_manager.py"} <= paths
    assert not [path for path in paths if "tests" in path.split("/")]
    assert len({text for _, text in documents}) == len(documents) > 1_000


def test_files_that_are_there_are_kept_and_written_anew_they_are_the_same(corpus, tmp_path, capsys):
    (tmp_path / "python_docs.jsonl").write_text("mine\n")
    named = ["--sources", "python_docs", "stdlib_code"]
    assert smoke_corpus.main(["--output", str(tmp_path), *named]) == 0
    assert "python_docs.jsonl: kept" in capsys.readouterr().out
    assert (tmp_path / "python_docs.jsonl").read_text() == "mine\n"
    written = (tmp_path / "stdlib_code.jsonl").read_bytes()
    assert written == (corpus / "stdlib_code.jsonl").read_bytes()
    assert not (tmp_path / "package_docs.jsonl").exists()


def test_writing_it_needs_nothing_but_python(tmp_path):
    import subprocess

    corpora = pathlib.Path(smoke_corpus.__file__).parent
    code = (
        f"import sys; sys.path[:0] = {[str(corpora), str(corpora.parents[1])]};"
        ' import smoke_corpus; sys.exit(bool({"numpy", "jax"} & set(sys.modules)))'
    )
    subprocess.run([sys.executable, "-S", "-c", code], check=True)
