"""Pages of HTML into documents."""

import json

import pytest

pytest.importorskip("resiliparse.extract.html2text")

from html_text import main, page_text

PAGE = """<!DOCTYPE html><html lang="de"><head><title>Titel</title></head><body>
<header>Hilfe</header><aside>Index</aside><nav>Module</nav>
<h1>Tabelle einfügen</h1>
<p>Wählen Sie <span class="MAC">Tabelle</span><span hidden="true">Einfügen</span>.</p>
<p>Zweiter Absatz.</p><script>var x = 1;</script><footer>Fehlersuche</footer></body></html>"""


def test_a_page_becomes_its_text_in_paragraphs_without_navigation_and_what_is_skipped():
    text = page_text(PAGE.encode(), [".MAC"])
    assert text == "Tabelle einfügen\n\nWählen Sie Einfügen.\n\nZweiter Absatz."
    assert "Tabelle" in page_text(PAGE.encode()).split("Wählen")[1]


def test_a_page_in_another_encoding_keeps_its_letters():
    page = PAGE.replace("<title>", '<meta charset="iso-8859-1"><title>').encode("iso-8859-1")
    assert "Wählen Sie" in page_text(page)


@pytest.mark.parametrize("text", ["ù", "è", "Calcule le test Khi-deux d’un échantillon"])
def test_a_short_page_in_utf_8_is_never_taken_for_another_encoding(text):
    assert page_text(f"<p>{text}</p>".encode()) == text


def test_pages_are_written_in_the_order_of_their_paths_and_empty_ones_are_left_out(
    tmp_path, capsys
):
    pages = {"b/two.html": PAGE, "a.htm": "<p>eins</p>", "c.html": "<nav>nur Module</nav>"}
    for name, page in pages.items():
        path = tmp_path / "pages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page)
    output = tmp_path / "out" / "pages.jsonl"
    assert main(["--input", str(tmp_path / "pages"), "--output", str(output)]) == 0
    documents = [json.loads(line) for line in output.read_text().splitlines()]
    assert [d["id"] for d in documents] == ["a.htm", "b/two.html"]
    assert documents[0]["text"] == "eins"
    assert "2 pages, 1 without text" in capsys.readouterr().out
    assert list(output.parent.iterdir()) == [output]


def test_a_folder_without_pages_is_an_error_that_names_it(tmp_path, capsys):
    assert main(["--input", str(tmp_path), "--output", str(tmp_path / "x.jsonl")]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
