"""Real text that every Python holds.

    python launch/corpora/smoke_corpus.py --output DIR

Writes two sources' documents as jsonl, one document a line with its `text` and its `id`:

    stdlib_code.jsonl    the sources of the standard library, a document a file
    package_docs.jsonl   the long descriptions of the installed packages, a document a package

The standard library's own tests are left out, as in many distributions of Python: so the corpus is
nearly the same everywhere. A file that is there already is kept, so that preparing it again finds
nothing changed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import pathlib
import sys
import sysconfig
import tokenize
from collections.abc import Iterator

from stablelm_jax.storage.files import replacing

# site-packages is not the standard library; the others hold its tests.
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def stdlib_code() -> Iterator[tuple[str, str]]:
    """(path within the standard library, source text) of its modules, sorted by path."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _LEFT_OUT.isdisjoint(relative.parts):
            continue
        try:
            with tokenize.open(path) as file:  # follows the encoding that the source declares
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue  # a source that Python itself would not take
        if text.strip():
            yield relative.as_posix(), text


def package_docs() -> Iterator[tuple[str, str]]:
    """(name and version, long description) of the installed packages, sorted by name."""
    found = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata
        # In old metadata the description is a header, in newer the body.
        text = metadata.get_payload() or metadata.get("Description", "")
        name = metadata.get("Name")
        if name and isinstance(text, str) and text.strip():
            # The first one found is the one that Python imports.
            found.setdefault(name.lower(), (f"{name} {distribution.version}", text.strip() + "\n"))
    return iter(found[name] for name in sorted(found))


SOURCES = {"stdlib_code": stdlib_code, "package_docs": package_docs}


def write(directory: pathlib.Path) -> list[str]:
    """Writes what is missing in `directory`; returns a line on each file."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, documents in SOURCES.items():
        path, count = directory / f"{name}.jsonl", 0
        if path.exists():
            lines.append(f"{path}: kept")
            continue
        with replacing(path) as aside, open(aside, "w", encoding="utf-8") as file:
            for title, text in documents():
                file.write(json.dumps({"id": title, "text": text}, ensure_ascii=False) + "\n")
                count += 1
        lines.append(f"{path}: {count:,} documents, {path.stat().st_size / 1e6:.1f} MB")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad arguments (argparse)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, type=pathlib.Path, metavar="DIR")
    for line in write(parser.parse_args(arguments).output):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
