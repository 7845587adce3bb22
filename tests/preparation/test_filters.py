"""--filters: what is asked for is done and said in full, and each dropped document is counted."""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import subprocess
import sys
import time

import pytest
from prepared import check_contents

from stablelm_jax import prepare
from stablelm_jax.data import manifest
from stablelm_jax.data.shards import Shard
from stablelm_jax.preparation import chunks, filters
from stablelm_jax.preparation.filters import FilterError, in_full
from stablelm_jax.preparation.recipe_flags import filters_asked
from stablelm_jax.preparation.recipes import RecipeSource, load_recipe
from stablelm_jax.preparation.screening import Dropped, Screen
from stablelm_jax.preparation.streams import Rejected
from stablelm_jax.tokenizer.tokenizer import load_tokenizer

TESTS = pathlib.Path(__file__).parents[1]
LONGER = "document_filters.Longer"
RECIPE = {"web": ("gopher", "language"), "code": ()}
# After the beginning of the Universal Declaration of Human Rights.
RIGHTS = {
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft"
    " und Gewissen begabt und sollen einander im Geist der Brüderlichkeit begegnen. Niemand darf zu"
    " Folter verurteilt werden, und das ist von allen zu achten.",
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with"
    " reason and conscience and should act towards one another in a spirit of brotherhood. No one"
    " is to be tortured, and that is to be respected by all.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como"
    " están de razón y conciencia, deben comportarse fraternalmente los unos con los otros. Nadie"
    " será sometido a torturas, y es un deber que todos han de respetar en el mundo.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués"
    " de raison et de conscience et doivent agir les uns envers les autres dans un esprit de"
    " fraternité. Nul ne sera soumis à la torture, et c'est le devoir de tous avec les autres.",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono dotati"
    " di ragione e di coscienza e devono agire gli uni verso gli altri in spirito di fratellanza."
    " Che nessun individuo sia sottoposto a tortura è il dovere di tutti, e con tutti.",
    "nl": "Alle mensen worden vrij en gelijk in waardigheid en rechten geboren. Zij zijn begiftigd"
    " met verstand en geweten, en behoren zich jegens elkander in een geest van broederschap te"
    " gedragen. Niemand zal gefolterd worden, en dat is de plicht van het hele volk.",
    "pt": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Dotados de"
    " razão e de consciência, devem agir uns para com os outros em espírito de fraternidade."
    " Ninguém será submetido a tortura, e é o dever de todos que o mundo seja para todos.",
}


def call(capsys, *arguments):
    code = prepare.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def digests(directory):
    """sha256 of every file of a source."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


# What is asked for


def test_filters_are_written_as_calls_and_kept_with_all_their_parameters():
    asked = ["gopher,", "c4(filter_no_terminal_punct=False)", "language(threshold=0.8)"]
    steps = in_full(asked, ["de"])["steps"]
    assert [step["name"] for step in steps] == [
        "gopher_repetition", "gopher_quality", "c4", "language",
    ]  # fmt: skip
    repetition, quality, c4, language = (step["parameters"] for step in steps)
    assert repetition["top_n_grams"] == [[2, 0.2], [3, 0.18], [4, 0.16]]
    assert quality["min_doc_words"] == 50 and quality["language"] == "de"
    assert "und" in quality["stop_words"] and "the" not in quality["stop_words"]
    assert c4["filter_no_terminal_punct"] is False and c4["min_num_sentences"] == 5
    assert language == {
        "languages": ["de"], "threshold": 0.8, "backend": "py3langid", "model": "",
    }  # fmt: skip
    assert in_full(["gopher_quality"], [])["steps"][0]["parameters"]["language"] == "en"
    assert in_full([], ["de"]) == {}
    assert "datatrove" in in_full(["c4"], [])["versions"]


def test_the_recipe_of_fineweb_keeps_its_order_and_lines_without_a_full_stop():
    steps = in_full(["fineweb_recipe"], [])["steps"]
    names = "language gopher_repetition gopher_quality c4 fineweb"
    assert " ".join(step["name"] for step in steps) == names
    assert steps[3]["parameters"]["filter_no_terminal_punct"] is False


@pytest.mark.parametrize(
    "asked, said",
    [
        ("goffer", ["unknown, perhaps 'gopher'; there are gopher_repetition", "fineweb_recipe"]),
        ("gopher(min_doc_words=20)", ["parameters: gopher_repetition, gopher_quality"]),
        ("gopher_quality(min_words=20)", ["no parameter 'min_words', perhaps", "max_doc_words"]),
        ("c4(5)", ["a parameter without its name", "c4(min_num_sentences=3)"]),
        ("c4(", ["not understood ('(' was never closed)"]),
        ("gopher_quality(min_doc_words=20", ["not understood ('(' was never closed)"]),
        ("gopher_quality(min_doc_words=twenty)", ["min_doc_words='twenty': takes a number, such"]),
        ("c4(min_num_sentences=[3])", ["min_num_sentences=[3]: takes a number, such as 5"]),
        ("c4(filter_javascript=maybe)", ["filter_javascript='maybe': takes True or False"]),
        ("language(languages=de)", ["languages='de': takes a list, such as ()"]),
        ("language(backend=3)", ["backend=3: takes a text, such as 'py3langid'"]),
        ("recipe", ["--filters recipe: only with --recipe"]),
        ("os.path", ["--filters os.path: is no class with filter(document)"]),
        ("math.pi", ["--filters math.pi: is no class with filter(document)"]),
        ("builtins.dict", ["is no class with filter(document)"]),
        ("c4(min_num_sentences=1e999)", ["not understood"]),
        ("nowhere.Filter", ["No module named 'nowhere'", "PYTHONPATH"]),
        ("datatrove.pipeline.filters.RegexFilter", ["give regex_exp=..."]),
    ],
)
def test_what_cannot_be_asked_for_is_refused_with_what_there_is(asked, said):
    with pytest.raises(FilterError) as error:
        in_full([asked], ["en"])
    assert all(part in str(error.value) for part in said), error.value


def test_a_filter_of_one_language_asks_which_where_a_source_has_several():
    with pytest.raises(FilterError, match=r"gopher_quality\(language=de\)"):
        in_full(["gopher_quality"], ["de", "fr"])
    given = in_full(["gopher_quality(language=fr)", "language"], ["de", "fr"])["steps"]
    assert given[0]["parameters"]["stop_words"] == filters.STOP_WORDS["fr"].split()
    assert given[1]["parameters"]["languages"] == ["de", "fr"]
    with pytest.raises(FilterError, match=r"no stop words of the language 'pt-BR'.*ISO 639-1"):
        in_full(["gopher_quality"], ["pt-BR"])


def test_a_module_that_fails_as_it_is_imported_is_told(tmp_path, monkeypatch):
    (tmp_path / "failing_filters.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FilterError, match=r"--filters failing_filters\.One: division by zero"):
        in_full(["failing_filters.One"], [])


def test_any_number_is_a_number_and_none_and_a_parameter_without_a_default_take_anything():
    asked = "gopher_quality(min_doc_words=None, max_avg_word_length=9.5, stop_words=[a, b])"
    found = in_full([asked], [])["steps"][0]["parameters"]
    assert found["min_doc_words"] is None and found["max_avg_word_length"] == 9.5
    assert found["stop_words"] == ["a", "b"]


@pytest.mark.parametrize(
    "asked, said",
    [
        ("language", r"\.\[filters\]"),
        ("language(backend=ft176, model='nowhere.bin')", r"\.\[fasttext\].* lid\.176\.bin"),
        ("language(backend=cld3)", "there are py3langid and ft176"),
        (f"{LONGER}(words=None)", "TypeError"),
    ],
)
def test_what_a_filter_needs_and_lacks_is_said_before_any_work(asked, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)  # as if it were not installed
    with pytest.raises(FilterError, match=said):
        Screen.of({"filters": in_full([asked], ["en"])})


# What they do


def judged(asked, text, language="en"):
    return Screen.of({"filters": in_full([asked], [language])}).judge(text)


def test_a_filter_that_fails_on_a_text_costs_that_text_only():
    screen = Screen.of({"filters": in_full([LONGER], [])})
    assert screen.judge("one that may stumble") == Rejected(
        f"filter {LONGER} failed: IndexError: no such word"
    )
    assert screen.judge("a secret of three words") == "a  of three words"
    assert screen.judge("a secret") == Dropped(LONGER, "of 1 words")


@pytest.mark.parametrize("text", ["(" * 100_000, "_" * 100_000, "a " * 5_000_001, "=-" * 10_000])
def test_a_text_that_would_take_the_filters_hours_is_rejected_at_once(text):
    assert isinstance(judged("c4_paragraphs", text), Rejected)


def test_the_language_filter_says_what_a_text_looks_like():
    pytest.importorskip("py3langid")
    screen = Screen.of({"filters": in_full(["language"], ["de", "nl"])})
    for language, text in RIGHTS.items():
        kept = language in ("de", "nl")
        dropped = Dropped("language", f"looks like {language}")
        assert screen.judge(text) == (text if kept else dropped)


def test_words_are_split_and_stop_words_known_in_each_of_the_seven_languages():
    pytest.importorskip("spacy")
    asked = "gopher_quality(min_doc_words=20)"
    for language, text in RIGHTS.items():
        assert judged(asked, text, language) == text
    by = "gopher_quality"
    assert judged(asked, RIGHTS["de"], "en") == Dropped(by, "gopher_enough_stop_words")
    assert judged(asked, "Zu kurz.", "de") == Dropped(by, "gopher_short_doc")
    lines = RIGHTS["fr"] + "\nUne ligne sans point\nVoir notre politique { } ici."
    assert judged("c4", lines, "fr") == Dropped("c4", "curly_bracket")
    assert judged("c4(min_num_sentences=3)", RIGHTS["fr"] + "\nDeux mots.", "fr") == RIGHTS["fr"]


# A source through them


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Documents of 1 to 9 words, some with a word that is taken out, some that cannot be judged."""
    rng = random.Random(0)
    made = [f"{n} " + " ".join(rng.choices("a bc def secret".split(), k=n % 9)) for n in range(900)]
    made[::100] = [f"{n} stumble" for n in range(9)]
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    filler = "-" * 300  # enough for several chunks
    rows = [{"text": text, "filler": filler} for text in made]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, made


def as_filtered(text):
    """What is to become of a text: the text that is kept, or the number of its words."""
    kept = text.replace("secret", "").strip()
    return kept if len(kept.split()) >= 3 else len(kept.split())


def arguments(texts, output, tokenizer_file):
    return [
        '--source', 'short', '--input', str(texts[0]), '--output', str(output),
        '--tokenizer', tokenizer_file, '--filters', LONGER,
    ]  # fmt: skip


def test_each_dropped_document_is_counted_and_some_are_kept_to_look_at(
    texts, tokenizer_file, tmp_path, capsys
):
    wanted = arguments(texts, tmp_path, tokenizer_file)
    code, out, _ = call(capsys, *wanted)
    assert code == 0
    judged = [as_filtered(text) for text in texts[1] if "stumble" not in text]
    dropped = collections.Counter(each for each in judged if isinstance(each, int))
    counts = {f"{LONGER}: of {words} words": count for words, count in dropped.items()}
    made = manifest.read_manifest(tmp_path / "short")
    assert made.provenance["dropped"] == counts
    assert made.rejected == 9 and made.train.documents + made.held_out.documents == sum(
        isinstance(each, str) for each in judged
    )
    edited = [text for text in texts[1] if "secret" in text and isinstance(as_filtered(text), str)]
    assert made.provenance["edited_by_filters"] == len(edited)
    assert made.provenance["settings"]["filters"]["steps"] == [
        {"name": LONGER, "parameters": {"words": 3, "without": "secret"}}
    ]
    assert f"filters: {LONGER} (language: en, as no --language is given)" in out
    check_contents(tmp_path / "short", made)
    tokenizer, kept = load_tokenizer(tokenizer_file), []
    for info in made.shards:
        shard = Shard(tmp_path / "short" / info.file)
        edges = zip(shard.document_offsets, shard.document_offsets[1:])
        kept += [tokenizer.decode(shard.read(first, last)[:-1].tolist()) for first, last in edges]
    assert sorted(kept) == sorted(each for each in judged if isinstance(each, str))

    rows = [json.loads(line) for line in open(tmp_path / "short" / "dropped.jsonl")]
    assert collections.Counter(row["reason"] for row in rows) == {
        f"of {words} words": min(count, 20) for words, count in dropped.items()
    }
    assert all(texts[1][row["line"] - 1] == row["beginning"] for row in rows)
    code, shown, _ = call(capsys, "--show-dropped", tmp_path / "short")
    assert code == 0
    assert f"{LONGER}: of 2 words: documents: {dropped[2]:,}, shown: 20" in shown
    assert all(f"texts.jsonl, line {row['line']:,}" in shown for row in rows)

    assert "already prepared" in call(capsys, *wanted)[1]
    wanted[-1] = f"{LONGER}(words=4)"
    code, _, err = call(capsys, *wanted)
    assert code == 1 and "was prepared with other filters" in err


def test_killed_and_gone_on_with_by_more_workers_the_filtered_source_is_the_same_bytes(
    texts, tokenizer_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(chunks, "_MIN_CHUNK_BYTES", 40_000)
    monkeypatch.setattr(chunks, "_CHUNKS_PER_SOURCE", 10**9)
    whole, killed = (arguments(texts, tmp_path / name, tokenizer_file) for name in "ab")
    assert call(capsys, *whole, "--workers", 1)[0] == 0
    marker, outputs = tmp_path / "kill", tmp_path / "b" / "short" / ".work" / "outputs"
    paths = os.pathsep.join(map(str, [TESTS.parent, TESTS, os.environ.get("PYTHONPATH", "")]))
    slowly = {"CHUNKS_DELAY": "0.2", "CHUNKS_KILL_WORKER": str(marker)}
    process = subprocess.Popen(
        [sys.executable, TESTS / "preparation" / "in_small_chunks.py", *killed, "--workers", "2"],
        env={**os.environ, "PYTHONPATH": paths, **slowly},
        stderr=subprocess.PIPE,
    )
    while process.poll() is None and not [*outputs.glob("[0-9]*")]:
        time.sleep(0.01)
    marker.touch()  # from now on, a worker that finishes something is killed
    _, error = process.communicate(timeout=300)
    assert process.returncode == 1 and b"a worker was killed" in error
    code, out, error = call(capsys, *killed, "--workers", 3)
    assert code == 0 and "going on with what was begun" in out, error
    assert digests(tmp_path / "b" / "short") == digests(tmp_path / "a" / "short")


def test_filters_that_drop_everything_are_said_and_others_begin_anew(
    texts, tokenizer_file, tmp_path, capsys
):
    wanted = arguments(texts, tmp_path, tokenizer_file)
    code, _, err = call(capsys, *wanted[:-1], "c4_paragraphs")
    assert code == 1
    assert "(dropped by c4_paragraphs: < 3 paragraphs: 900); look at some" in err
    code, shown, _ = call(capsys, "--show-dropped", tmp_path / "short")
    assert code == 0 and "paragraphs: documents: 900, shown: 20" in shown
    assert call(capsys, *wanted)[0] == 0


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--filters", "gofer"], "perhaps 'gopher'"),
        (["--filters", "os.path"], "is no class with filter(document)"),
        (["--filters", "recipe"], "--filters recipe: only with --recipe"),
        (["--filters", "c4_paragraphs", "--template", "zephyr"], "--filters: not with --template"),
    ],
)
def test_bad_filters_exit_with_2_and_one_line(flags, said, texts, tokenizer_file, tmp_path, capsys):
    wanted = arguments(texts, tmp_path, tokenizer_file)[:-2]
    code, _, err = call(capsys, *wanted, *flags)
    assert code == 2 and said in err and len(err.splitlines()) == 1


def test_the_filters_of_a_recipe_are_taken_unless_a_source_must_not_be_filtered():
    web, code = (RecipeSource(name, (), filters=filters) for name, filters in RECIPE.items())
    code = dataclasses.replace(code, unfiltered="code")
    assert filters_asked(web, ["recipe"]) == ("gopher", "language")
    assert filters_asked(code, ["recipe"]) == () == filters_asked(code, ())
    assert filters_asked(web, ["c4"]) == ["c4"]
    with pytest.raises(ValueError, match=r"code must not be filtered \(code\)"):
        filters_asked(code, ["c4"])


def test_the_filters_that_the_recipes_name_are_known():
    for name in ("stablelm_2", "demo"):
        for source in load_recipe(name).sources:
            assert bool(in_full(source.filters, source.languages[:1])) == bool(source.filters)
            assert not (source.filters and source.unfiltered)


@pytest.mark.parametrize(
    "asked, said",
    [
        ("data/code", "was prepared without --filters; give a source prepared with --filters"),
        ("data", "is no source; give a source prepared with --filters: {here}/data/web\n"),
        (".", "is no source; give a source prepared with --filters: DATA/NAME\n"),
        ("nowhere", "No such file or directory; give a source"),
    ],
)
def test_what_has_no_dropped_documents_to_show_is_told_by_what_it_is(asked, said, tmp_path, capsys):
    for file in ("code/manifest.json", "web/manifest.json", "web/dropped.jsonl"):
        (tmp_path / "data" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / file).touch()
    code, _, error = call(capsys, "--show-dropped", tmp_path / asked)
    assert code == 2 and error.count("\n") == 1 and error.count("[Errno") == 0
    assert f"--show-dropped {tmp_path / asked}: {said.format(here=tmp_path)}" in error
