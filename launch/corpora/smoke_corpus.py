"""Real text that every Python holds, once this project is installed.

    python launch/corpora/smoke_corpus.py --output DIR [--sources NAME...]

Writes sources as jsonl, one document a line with its `text` and its `id`, the file it is from:

    python_docs.jsonl    English: the standard library's docstrings, and what Python's help() tells
    package_docs.jsonl   English: the docstrings of packages that this project needs
    stdlib_code.jsonl    the sources of the standard library, a document a file

Of docstrings those paragraphs are kept that are English sentences, each once. Tests are left out,
as in many distributions of Python, and packages that are there by chance: so the corpus is nearly
the same everywhere. A file that is there already is kept, so that preparing it again finds nothing
changed.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import itertools
import json
import pathlib
import pydoc_data.topics
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator

from stablelm_jax.storage.files import replacing

# site-packages is not the standard library; the others hold its tests.
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}

# Those of requirements.txt whose docstrings are more than a few pages of English.
_PACKAGES = (
    "flax", "fontTools", "fsspec", "huggingface_hub", "jax", "jinja2", "matplotlib", "numpy",
    "optax", "orbax", "scipy",
)  # fmt: skip

# What reStructuredText writes around words: :class:`~a.B`, ``x``, `x`, *x*, **x**.
_MARKUP = re.compile(r"(?::[a-z:]+:)?(`+|\*+)(?:~[\w.]*\.)?(\w[^`*<]*?)(?: <[^`]*>)?\1(?:__?\b)?")
_PLAIN_WORD = re.compile(r"[(\"'“]*[A-Za-z][a-z]*(?:[-'’][a-z]+)*[.,;:)\"'”]*")


def _modules(root: pathlib.Path) -> Iterator[tuple[str, str]]:
    """(path within `root`, source text) of the modules in it, sorted by path."""
    for path in sorted(root.rglob("*.py")):
        if not _LEFT_OUT.isdisjoint(path.relative_to(root).parts):
            continue
        try:
            with tokenize.open(path) as file:  # follows the encoding that the source declares
                text = file.read()
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # a source that Python itself would not take, a link to nowhere, a folder
        if text.strip():
            yield path.relative_to(root).as_posix(), text


def stdlib_code() -> Iterator[tuple[str, str]]:
    """(path within the standard library, source text) of its modules, sorted by path."""
    return _modules(pathlib.Path(sysconfig.get_path("stdlib")))


def _docstrings(modules: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(path, docstring) of every module, class and function of `modules`."""
    for path, text in modules:
        if '"""' not in text:
            continue  # parsing takes nearly all of the time
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue  # written for another Python than this one, or nested too deep for it
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, ast.get_docstring(node) or ""


def _prose(paragraph: str) -> str:
    """The paragraph on one line, without markup; "" if it is no English sentence."""
    text = _MARKUP.sub(r"\2", " ".join(paragraph.split()))
    words = text.split()
    plain = sum(bool(_PLAIN_WORD.fullmatch(word)) for word in words)
    is_sentence = re.fullmatch(r"[A-Z][a-z]*[ ,'](?!.*(?:--| : )).*\.", text)
    return text if is_sentence and len(words) >= 4 and plain >= 0.85 * len(words) else ""


def _sentences(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The English of each document, a paragraph a line; no paragraph comes twice."""
    seen = {""}
    for path, document in documents:
        kept = []
        for paragraph in re.split(r"\n\s*\n", document):
            text = _prose(paragraph)
            if text not in seen:
                seen.add(text)
                kept.append(text)
        if kept:
            yield path, "\n\n".join(kept) + "\n"


def python_docs() -> Iterator[tuple[str, str]]:
    """(path, sentences) of the standard library's docstrings, and of what Python's help() tells."""
    topics = (
        ("pydoc_data/topics.py", text) for _, text in sorted(pydoc_data.topics.topics.items())
    )
    return _sentences(itertools.chain(_docstrings(stdlib_code()), topics))


def package_docs() -> Iterator[tuple[str, str]]:
    """(path, sentences) of the docstrings of packages."""
    return _sentences(
        (f"{package}/{path}", docstring)
        for package in _PACKAGES
        if (spec := importlib.util.find_spec(package))  # which does not import it
        for place in spec.submodule_search_locations or ()
        for path, docstring in _docstrings(_modules(pathlib.Path(place)))
    )


SOURCES = {"stdlib_code": stdlib_code, "python_docs": python_docs, "package_docs": package_docs}


def write(directory: pathlib.Path, names: Iterable[str] = tuple(SOURCES)) -> list[str]:
    """Writes what is missing of these sources in `directory`; returns a line on each file."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in names:
        path, count = directory / f"{name}.jsonl", 0
        if path.exists():
            lines.append(f"{path}: kept")
            continue
        with replacing(path) as aside, open(aside, "w", encoding="utf-8") as file:
            for origin, text in SOURCES[name]():
                file.write(json.dumps({"id": origin, "text": text}, ensure_ascii=False) + "\n")
                count += 1
        lines.append(f"{path}: {count:,} documents, {path.stat().st_size / 1e6:.1f} MB")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad arguments (argparse)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, type=pathlib.Path, metavar="DIR")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=[*SOURCES])
    flags = parser.parse_args(arguments)
    for line in write(flags.output, flags.sources):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
