"""What mkdocs adds to docs/: pages made from other files, links out of docs/, new pages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from posixpath import dirname, normpath, relpath

from docs_reference import commands_page, options_page
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]

# Page of the site -> file of the checkout, for those that are not docs/<page>.
ELSEWHERE = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")  # the target of [text](target#anchor)


def on_files(files, config):
    """Adds pages made from other files and from the code, and files that a page links to."""
    made = {page: (ROOT / path).read_text(encoding="utf-8") for page, path in ELSEWHERE.items()}
    made |= {"options.md": options_page(), "commands.md": commands_page()}
    notebooks = [file for file in files if file.src_uri.endswith(".ipynb")]
    for file in notebooks:
        made[_page_of(f"docs/{file.src_uri}")] = notebook_page(file.content_string, file.src_uri)
    texts = made | {file.src_uri: file.content_string for file in files.documentation_pages()}
    for page, text in texts.items():
        for path in linked_files(page, text):
            made.setdefault(_page_of(path), file_page(path))
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    style = str(Path(__file__).with_name("site.css"))
    files.append(File.generated(config, "site.css", abs_src_path=style))
    config.nav += _more(config.nav, files)
    return files


def on_page_markdown(markdown, page, config, **_):
    """Links as the checkout has them become links of the site; the front page lists the tasks."""
    name, folder = page.file.src_uri, _folder(page.file.src_uri)

    def link(match: re.Match) -> str:
        path = normpath(f"{folder}/{match[0]}")
        if not (ROOT / path).is_file():  # mkdocs tells of it
            return match[0]
        return relpath(_page_of(path), dirname(name) or ".")

    # In a table GitHub wants | escaped inside `code` too; here that would show the escape.
    markdown = re.sub(r"(?m)^\|.*", lambda row: row[0].replace("\\|", "|"), markdown)
    markdown = _outside_code(lambda text: LINK.sub(link, text), markdown)
    if name == "index.md":  # behind the title and the first paragraph
        title, first, rest = markdown.split("\n\n", 2)
        markdown = "\n\n".join([title, first, tasks(config.nav), rest])
    return markdown


def tasks(nav: list) -> str:
    """A line for each section of the navigation, with links to its pages."""
    lines = []
    for section in nav:
        ((task, pages),) = section.items()
        named = [entry if isinstance(entry, dict) else {entry: entry} for entry in pages]
        entries = [pair for entry in named for pair in entry.items() if pair[1] != "index.md"]
        links = [f"[{title}]({page})" for title, page in entries]
        lines += [f"* **{task}**: {', '.join(links)}"] if links else []
    return "\n".join(lines)


def linked_files(page: str, text: str) -> Iterator[str]:
    """Those outside docs/ that a page links to, named from the top of the checkout."""
    for target in LINK.findall(text):
        path = normpath(f"{_folder(page)}/{target}")
        if not path.startswith(("docs/", "../")) and path not in ELSEWHERE.values():
            if (ROOT / path).is_file():
                yield path


def file_page(path: str) -> str:
    """A file of the checkout as a page, which the search leaves out."""
    text = (ROOT / path).read_text(encoding="utf-8")
    language = {".py": "python", ".sh": "bash"}.get(Path(path).suffix, "text")
    head = "---\nsearch:\n  exclude: true\n---\n\n"
    return f"{head}# {path}\n\n{_fenced(text, language)}\n"


def notebook_page(text: str, name: str) -> str:
    """A notebook as Markdown, with the outputs that it holds."""
    parts = [f"*[This page as a notebook]({name}), to run and to change.*"]
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        is_code = cell["cell_type"] == "code"
        parts.append(_fenced(source, "python") if is_code else source)
        parts += [_output(output) for output in cell.get("outputs", ())]
    title = parts[1].partition("\n")  # the first cell begins with it
    parts[:2] = [title[0], parts[0], title[2]]
    return "\n\n".join(parts) + "\n"


def _output(output: dict) -> str:
    """What one cell wrote: a picture, or text."""
    data = output.get("data", {})
    if "image/png" in data:
        picture = data["image/png"].replace("\n", "")
        return f"![What the cell above draws](data:image/png;base64,{picture})"
    return _fenced("".join(output.get("text", data.get("text/plain", ""))), "text")


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _outside_code(change: Callable[[str], str], markdown: str) -> str:
    """`change` of all that stands in no fence, no indented block and no `code`."""
    code = re.compile(r"^(?:```.*?^```|    [^\n]*)|`[^`\n]+`", re.MULTILINE | re.DOTALL)
    parts, end = [], 0
    for match in code.finditer(markdown):
        parts += [change(markdown[end : match.start()]), match[0]]
        end = match.end()
    return "".join(parts) + change(markdown[end:])


def _folder(page: str) -> str:
    """Where the file that a page is made from lies, from the top of the checkout."""
    return dirname(ELSEWHERE.get(page, f"docs/{page}")) or "."


def _page_of(path: str) -> str:
    """What stands on the site for a file of the checkout."""
    for page, elsewhere in ELSEWHERE.items():
        if path == elsewhere:
            return page
    if path.startswith("docs/"):
        return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
    return f"source/{path}.md"


def _more(nav: list, files) -> list:
    """A last section of the pages that nav does not name; none where there are none."""
    named = set(re.findall(r"[\w/.-]+\.md", json.dumps(nav)))
    pages = {file.src_uri for file in files.documentation_pages()} - named
    shown = sorted(page for page in pages if not page.startswith("source/"))
    return [{"More": shown}] if shown else []
