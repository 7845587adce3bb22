"""Conversations and preference pairs out of manuals: made-up pages, a tokenizer of letters."""

import json

import chat_corpus
import pytest
from chat_corpus import LANGUAGES, Cutter, Page, groups, main, usable
from tokenizers import Tokenizer, models, pre_tokenizers

from stablelm_jax.tokenizer.chat import chat_template, encode_conversation
from stablelm_jax.tokenizer.tokenizer import load_tokenizer

FAQ = """<html><body><div class="chapter"><h1 class="title">Chapter</h1>
<div class="section"><div class="titlepage"><h2 class="title"><a id="{anchor}"></a>1.1. {title}</h2>
</div><p>{one}</p><p>{two}</p></div></div></body></html>"""


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """A token a byte, and `<|endoftext|>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def manuals(tmp_path):
    """Three how-to pages a language, of which one is English everywhere; a question of the FAQ."""
    pytest.importorskip("resiliparse.extract.html2text")
    folder = tmp_path / "fetched"
    folder.mkdir()
    for language in LANGUAGES:
        pages = {
            "swriter/guide/table": f"Table {language}\n\nOpen {language}.\n\nClose {language}.",
            "scalc/guide/color": f"Color {language}\n\nPaint cells as {language} does.\n\nMore",
            "scalc/guide/old": f"Old {language}\n\nNobody translated these words.",
            "scalc/01/menu": "Menu\n\nNo how-to page.",
        }
        lines = (
            json.dumps({"id": f"{language}/text/{name}.html", "text": text}) + "\n"
            for name, text in pages.items()
        )
        (folder / f"libreoffice_help_{language}.jsonl").write_text("".join(lines), encoding="utf-8")
        package = folder / ("debian-faq" if language == "en" else f"debian-faq-{language}")
        if language != "es":
            package.mkdir()
            said = {"one": f"Því {language}.", "two": f"Über {language}!"}
            text = FAQ.format(anchor="why", title=f"Why {language}?", **said)
            (package / f"basic.{language}.html").write_text(text, encoding="utf-8")
    return folder


def records(folder, kind, language):
    text = (folder / f"{kind}_{language}.jsonl").read_text(encoding="utf-8")
    return {record["topic"]: record for record in map(json.loads, text.splitlines())}


def run(manuals, tokenizer_file, output, *more):
    arguments = ["--input", str(manuals), "--tokenizer", str(tokenizer_file)]
    return main([*arguments, "--output", str(output), *more])


def test_a_title_is_answered_by_its_page_and_the_topic_is_the_same_in_all_languages(
    manuals, tokenizer_file, tmp_path, capsys
):
    assert run(manuals, tokenizer_file, tmp_path / "chat") == 0
    german = records(tmp_path / "chat", "howto", "de")
    assert set(german) == {"swriter/guide/table", "scalc/guide/color", "faq/why"}
    assert german["swriter/guide/table"]["messages"] == [
        {"role": "user", "content": "Table de"},
        {"role": "assistant", "content": "Open de.\n\nClose de."},
    ]
    assert german["faq/why"]["messages"][0]["content"] == "Why de?"
    assert "faq/why" not in records(tmp_path / "chat", "howto", "es")
    assert "not translated 6" in capsys.readouterr().out


def test_what_is_no_sentence_at_the_end_of_an_answer_goes(manuals, tokenizer_file, tmp_path):
    assert run(manuals, tokenizer_file, tmp_path / "chat") == 0
    page = records(tmp_path / "chat", "howto", "en")["scalc/guide/color"]
    assert page["messages"][1]["content"] == "Paint cells as en does."


def test_of_a_pair_the_chosen_side_is_in_the_asked_language_and_the_rejected_one_the_same_page(
    manuals, tokenizer_file, tmp_path
):
    assert run(manuals, tokenizer_file, tmp_path / "chat") == 0
    for language in LANGUAGES:
        pair = records(tmp_path / "chat", "pairs", language)["swriter/guide/table"]
        assert pair["prompt"] == [{"role": "user", "content": f"Table {language}"}]
        chosen, rejected = (pair[side][0]["content"] for side in ("chosen", "rejected"))
        assert chosen == f"Open {language}.\n\nClose {language}."
        assert rejected != chosen and rejected.startswith("Open ")


def test_random_answers_are_in_languages_that_do_not_follow_the_request(
    manuals, tokenizer_file, tmp_path
):
    for again in ("one", "two"):
        assert run(manuals, tokenizer_file, tmp_path / again) == 0
    answers = {
        record["messages"][1]["content"]
        for language in LANGUAGES
        for record in records(tmp_path / "one", "random", language).values()
    }
    assert len({answer[-3:] for answer in answers}) > 2
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_answers_are_cut_behind_whole_paragraphs_to_the_length_that_prepare_counts(tokenizer_file):
    tokenizer = load_tokenizer(str(tokenizer_file))
    paragraphs = ["First one.", "Then do this:", "Second one."]
    whole = chat_corpus.conversation("Ask", "\n\n".join(paragraphs))
    template = chat_template(chat_corpus.TEMPLATE, tokenizer)
    length = len(encode_conversation(tokenizer, whole, template).ids)
    assert Cutter(tokenizer, length).answer("Ask", paragraphs) == "\n\n".join(paragraphs)
    cutter = Cutter(tokenizer, length - 1)
    assert cutter.answer("Ask", paragraphs) == "First one."
    assert cutter.answer("Ask", ["Far too long a paragraph for so short a row of tokens."]) == ""
    assert cutter.counts == {"cut": 1, "nothing fits": 1}


def test_a_title_that_two_languages_share_is_left_out_for_it_does_not_say_what_is_asked():
    pages = [Page("a", "es", "Tabla", ("Uno.",)), Page("a", "pt", "Tabla", ("Um.",))]
    pages.append(Page("a", "de", "Tabelle", ("Eins.",)))
    counts = chat_corpus.collections.Counter()
    assert [page.language for page in usable(pages, counts)] == ["de"]
    assert counts["title of several languages"] == 2


def test_topics_that_share_a_title_in_any_language_are_held_out_together():
    titles = [("a", "en", "One"), ("b", "en", "Two"), ("b", "it", "Uno"), ("a", "it", "Uno")]
    titles += [("c", "de", "Drei"), ("c", "en", "Two"), ("d", "en", "Four")]
    found = groups([Page(topic, language, title, ()) for topic, language, title in titles])
    assert found["a"] == found["b"] == found["c"] != found["d"]


def test_a_folder_without_the_manuals_is_an_error_that_names_what_is_missing(
    tokenizer_file, tmp_path, capsys
):
    assert run(tmp_path, tokenizer_file, tmp_path / "chat") == 1
    assert "libreoffice_help_en.jsonl" in capsys.readouterr().err
