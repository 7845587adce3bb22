"""The site of docs/: it builds, all its links lead somewhere, and it needs no other server."""

import html
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import docs_hooks
import docs_reference
import pytest

from stablelm_jax.__main__ import VERBS
from stablelm_jax.config.tree import FIELDS, TREE

ROOT = Path(__file__).parents[2]
HERE = "http://site/"  # where the pages seem to lie


class Links(HTMLParser):
    """Where a page leads (`links`), what it loads (`loads`), where one can arrive (`anchors`)."""

    def __init__(self, page: Path):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], {""}
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag in ("script", "img", "link", "iframe"):
            self.loads += [given[key] for key in ("src", "href") if given.get(key)]
        elif given.get("href"):
            self.links.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site; a warning of mkdocs fails here."""
    folder = tmp_path_factory.mktemp("site")
    command = "-m mkdocs build --strict --quiet --config-file launch/site/mkdocs.yml --site-dir"
    done = subprocess.run(
        [sys.executable, *command.split(), str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    """{address: its links} of every page."""
    return {
        urljoin(HERE, path.relative_to(site).as_posix().removesuffix("index.html")): Links(path)
        for path in site.rglob("*.html")
        if path.is_file() and path.name != "404.html"  # its addresses are the server's own
    }


def test_every_page_of_docs_is_on_the_site_and_in_its_navigation(pages):
    front = {urljoin(HERE, link) for link in pages[HERE].links}
    for page in (ROOT / "docs").glob("*.md"):
        assert urljoin(HERE, f"{page.stem}/") in front


def test_every_link_of_the_site_leads_to_a_page_and_a_place_on_it(site, pages):
    for address, page in pages.items():
        for link in page.links + page.loads:
            target, anchor = urldefrag(urljoin(address, link))
            if not target.startswith(HERE):
                continue
            if target in pages:
                assert unquote(anchor) in pages[target].anchors, f"{address}: {link}"
            else:
                assert (site / unquote(urlsplit(target).path)[1:]).is_file(), f"{address}: {link}"


def test_no_page_loads_anything_from_another_server(site, pages):
    for address, page in pages.items():
        for load in page.loads:
            elsewhere = urlsplit(urljoin(address, load))
            assert elsewhere.scheme == "data" or elsewhere.hostname == "site", f"{address}: {load}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?http", style.read_text(encoding="utf-8")), style


def test_a_page_that_the_navigation_does_not_name_comes_last():
    (file,) = [type("File", (), {"src_uri": "new.md"})]
    files = type("Files", (), {"documentation_pages": lambda self: [file]})()
    assert docs_hooks._more([{"Start": ["index.md"]}], files) == [{"More": ["new.md"]}]
    assert docs_hooks._more([{"Start": ["new.md"]}], files) == []


def test_files_of_the_checkout_that_a_page_links_to_or_names_are_pages_and_links():
    text = """[smoke](../configs/smoke.py), `data/rows.py`, [`data`](data.md#look), [none](../no.py)

    python configs/demo_chat.py

# `configs/demo_chat.py`
`[code](../configs/demo_chat.py)`, `data/none.py`, [other](https://host/configs/smoke.py)
"""
    page = type("Page", (), {"file": type("File", (), {"src_uri": "chat.md"})})
    changed = text.replace("../configs/smoke.py", "source/configs/smoke.py.md").replace(
        "`data/rows.py`", "[`data/rows.py`](source/stablelm_jax/data/rows.py.md)"
    )
    assert docs_hooks.on_page_markdown(text, page, None) == changed
    named = ["configs/smoke.py", "stablelm_jax/data/rows.py"]
    assert list(docs_hooks.linked_files("chat.md", text)) == named
    assert "```python\n" in docs_hooks.file_page("configs/smoke.py")


def test_the_page_of_options_has_every_field_with_its_comment_and_a_place_to_link_to(pages):
    text = docs_reference.options_page()
    for key in [*FIELDS, "data.weights.NAME"]:
        assert f"#### `{key}` {{ #{key} }}" in text
        assert key in pages[f"{HERE}options/"].anchors
    clipping = text.partition("`optimizer.clip_norm`")[2].partition("####")[0]
    assert "lobal norm of the gradient. Number above 0; `1.0` by default." in clipping
    head = text.partition("`model.num_kv_heads`")[2].partition("####")[0]
    assert "grouped-query attention. Whole number; must be set." in head


def test_no_comment_of_the_tree_is_lost_on_the_page_of_options():
    """Those of several lines and those of groups too."""
    source = (ROOT / "stablelm_jax/config/tree.py").read_text(encoding="utf-8")
    tree = source.partition("TREE = {")[2].partition("\n}\n")[0]
    text = docs_reference.options_page().lower()
    words = [line.partition("# ")[2].lower() for line in tree.splitlines() if "# " in line]
    assert len(words) > len(FIELDS) / 2
    assert not [comment for comment in words if comment not in text]
    assert docs_reference.field_comments().keys() >= set(TREE)


def test_the_page_of_commands_has_every_verb_and_names_no_folder_of_this_machine(site):
    text = (site / "commands/index.html").read_text(encoding="utf-8")
    for verb in [*VERBS, "convert-to-gguf"]:
        assert f'<h{3 if "-" in verb else 2} id="{verb}">' in text
    assert str(ROOT) not in text and "accept-config-change" in text


def test_every_command_in_the_pages_has_only_flags_that_its_verb_knows(site):
    page = (site / "commands/index.html").read_text(encoding="utf-8")
    text = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r'<h2 id="(\w+)">', r"\n## \1 ", page)))
    known = {
        section.split()[0]: set(re.findall(r"--(?:\[no\])?([\w-]+)", section))
        for section in text.split("\n## ")[1:]
    }
    assert known.keys() == set(VERBS)
    pages = [page for page in (ROOT / "docs").glob("*.md") if page.name != "log.md"]
    for page in [ROOT / "README.md", *pages]:
        lines = page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
        for line in lines:
            for verb, rest in re.findall(r"-m stablelm_jax\.(\w+)([^|;&#`]*)", line):
                flags = set(re.findall(r"(?<= )--([\w-]+)(?![\w.-])", rest))
                assert flags - {"config"} <= known[verb], f"{page.name}: {line}"


def test_the_script_installs_the_extra_and_builds_or_serves_strictly(checkout):
    assert checkout.run("launch/docs.sh").returncode == 0
    assert checkout.run("launch/docs.sh", "serve").returncode == 0
    assert checkout.installed() == [["--editable", ".[docs]"]]
    strictly = ["--strict", "--config-file", "launch/site/mkdocs.yml"]
    assert checkout.calls("mkdocs") == [["build", *strictly], ["serve", *strictly]]
    refused = checkout.run("launch/docs.sh", "deploy")
    assert refused.returncode == 1 and "usage: " in refused.stderr
