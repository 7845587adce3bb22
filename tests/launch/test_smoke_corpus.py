"""The smoke run's corpus: what every Python holds, the same at every call."""

import importlib.metadata
import json
import pathlib
import sys
import sysconfig

import pytest
import smoke_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    smoke_corpus.write(folder)
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
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert dict(smoke_corpus.stdlib_code()) == {
        "good.py": "x = 1\n",
        "latin.py": '# coding: latin-1\nname = "Grün"\n',
    }


def test_the_prose_is_one_long_description_a_package(corpus):
    rows = read(corpus / "package_docs.jsonl")
    names = [row["id"].split()[0].lower() for row in rows]
    assert names == sorted(set(names))
    numpy = next(row for row in rows if row["id"] == f"numpy {importlib.metadata.version('numpy')}")
    assert numpy["text"] == importlib.metadata.metadata("numpy").get_payload().strip() + "\n"
    assert not numpy["text"].startswith("Metadata-Version")


def test_files_that_are_there_are_kept_and_written_anew_they_are_the_same(corpus, tmp_path, capsys):
    (tmp_path / "stdlib_code.jsonl").write_text("mine\n")
    assert smoke_corpus.main(["--output", str(tmp_path)]) == 0
    assert "stdlib_code.jsonl: kept" in capsys.readouterr().out
    assert (tmp_path / "stdlib_code.jsonl").read_text() == "mine\n"
    written = (tmp_path / "package_docs.jsonl").read_bytes()
    assert written == (corpus / "package_docs.jsonl").read_bytes()


def test_writing_it_needs_nothing_but_python(tmp_path):
    import subprocess

    corpora = pathlib.Path(smoke_corpus.__file__).parent
    code = (
        f"import sys; sys.path[:0] = {[str(corpora), str(corpora.parents[1])]};"
        ' import smoke_corpus; sys.exit(bool({"numpy", "jax"} & set(sys.modules)))'
    )
    subprocess.run([sys.executable, "-S", "-c", code], check=True)
