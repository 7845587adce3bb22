"""What mkdocs adds to docs/: pages made from other files, links out of docs/, new pages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import dirname, normpath, relpath

from docs_reference import commands_page, options_page
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]

# Page of the site -> file of the checkout, for those that are not docs/<page>.
ELSEWHERE = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}
# Code blocks and headings, which stay as they are; the target of [text](target#anchor); `a/name`.
PART = re.compile(
    r"^```.*?^```|^(?:    |#)[^\n]*"
    r"|(?<=\]\()(?!\w+:|#)(?P<target>[^)#\s]+)"
    r"|`(?P<name>[\w.-]+(?:/[\w.-]+)+)`|`[^`\n]+`",
    re.MULTILINE | re.DOTALL,
)
LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".json": "json", ".toml": "toml"}


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
    """Links as the checkout has them become links of the site, and so do names of its files."""
    name = page.file.src_uri

    def link(match: re.Match) -> str:
        path = file_meant(match, name)
        if path is None:  # where it should be one, mkdocs tells of it
            return match[0]
        to = relpath(_page_of(path), dirname(name) or ".")
        return to if match["target"] else f"[{match[0]}]({to})"

    # In a table GitHub wants | escaped inside `code` too; here that would show the escape.
    markdown = re.sub(r"(?m)^\|.*", lambda row: row[0].replace("\\|", "|"), markdown)
    markdown = PART.sub(link, markdown)
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


def file_meant(match: re.Match, page: str) -> str | None:
    """What a match of PART on a page means, from the top of the checkout; None: no file there."""
    paths = []
    if match["target"]:
        paths = [normpath(f"{dirname(ELSEWHERE.get(page, f'docs/{page}'))}/{match['target']}")]
    elif match["name"] and match.string[match.start() - 1 : match.start()] != "[":
        paths = [match["name"], f"stablelm_jax/{match['name']}"]
    paths = [path.removeprefix("/") for path in paths if not path.startswith("..")]
    return next((path for path in paths if (ROOT / path).is_file()), None)


def linked_files(page: str, text: str) -> Iterator[str]:
    """Those outside docs/ that a page links to or names."""
    for match in PART.finditer(text):
        path = file_meant(match, page)
        if path and not path.startswith("docs/") and path not in ELSEWHERE.values():
            yield path


def file_page(path: str) -> str:
    """A file of the checkout as a page, which the search leaves out."""
    text = (ROOT / path).read_text(encoding="utf-8")
    language = LANGUAGES.get(Path(path).suffix, "text")
    head = "---\nhide: [toc]\nsearch:\n  exclude: true\n---\n\n"
    return f"{head}# {path}\n\n{_fenced(text, language)}\n"


def notebook_page(text: str, name: str) -> str:
    """A notebook as Markdown, with the outputs that it holds."""
    parts = [f'<a href="../{name}" download>This page as a notebook</a>, to run and to change.']
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
