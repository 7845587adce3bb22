"""Pages of HTML into documents that `prepare` reads: one JSON line a page.

    python launch/corpora/html_text.py --input DIR --output FILE.jsonl [--skip SELECTOR ...]

Needs resiliparse (extra `html`). Headers, footers, sidebars and navigation are always left out, and
so is what matches a SELECTOR (CSS).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import orjson

from stablelm_jax.preparation.texts import page_text
from stablelm_jax.storage.files import replacing


def write_documents(folder: Path, output: Path, skip: Sequence[str] = ()) -> tuple[int, int]:
    """Writes the pages below `folder` in the order of their paths; returns (pages, without text).

    Raises:
      ValueError: no page below `folder`.
    """
    pages = sorted(path for path in folder.rglob("*") if path.suffix in (".html", ".htm"))
    if not pages:
        raise ValueError(f"{folder} holds no .html file; give the folder of the pages")
    without_text = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as aside, open(aside, "wb") as file:
        for path in pages:
            if text := page_text(path.read_bytes(), skip):
                name = path.relative_to(folder).as_posix()
                file.write(orjson.dumps({"id": name, "text": text}) + b"\n")
            else:
                without_text += 1
    return len(pages), without_text


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 on failure, 2 for bad arguments (argparse)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, required=True, help="folder of pages")
    parser.add_argument("--output", type=Path, required=True, help="the .jsonl file to write")
    parser.add_argument("--skip", action="append", default=[], help="CSS selector to leave out")
    arguments = parser.parse_args(argv)
    try:
        pages, without_text = write_documents(arguments.input, arguments.output, arguments.skip)
    except (ValueError, OSError) as error:
        print(f"html_text: {error}", file=sys.stderr)
        return 1
    except ImportError:
        print("html_text: needs resiliparse; pip install -e '.[html]'", file=sys.stderr)
        return 1
    print(f"{arguments.output}: {pages - without_text} pages, {without_text} without text left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
