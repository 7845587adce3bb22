"""Items of benchmarks that stand in documents are found, and nothing else is."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from seeds import new_rng

from stablelm_jax import prepare
from stablelm_jax.data import manifest
from stablelm_jax.preparation import contamination
from stablelm_jax.preparation.contamination import Benchmarks, Item, hit
from stablelm_jax.preparation.lists import CONTAMINATED_NAME, read_list, write_list

VOCABULARY = [f"{a}{b}" for a in ("ba", "ne", "to", "ri", "lu") for b in ("ma", "ke", "so", "di")]


def sentence(rng, words):
    return " ".join(f"{rng.choice(VOCABULARY)}{rng.integers(10_000)}" for _ in range(words))


def write_task_data(folder, **tasks):
    """A folder as launch/corpora/task_data.py writes it, of {task: rows}."""
    index = {}
    for task, rows in tasks.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{task}.parquet")
        index[task] = {"files": {"test": f"{task}.parquet"}, "changes": {}, "note": ""}
    (folder / "tasks.json").write_text(json.dumps({"packages": {}, "tasks": index}))
    return folder


@pytest.fixture(scope="module")
def rows():
    rng = new_rng()
    stories = [
        {"context": sentence(rng, 30), "endings": [sentence(rng, 14), sentence(rng, 9)], "label": 1}
        for _ in range(100)
    ]
    questions = [{"question": sentence(rng, 10), "answer": sentence(rng, 2)} for _ in range(20)]
    return {"stories": stories, "questions": questions}


@pytest.fixture(scope="module")
def benchmarks(rows, tmp_path_factory):
    return Benchmarks(write_task_data(tmp_path_factory.mktemp("tasks"), **rows))


def test_each_planted_item_is_found_whatever_its_case_and_punctuation(benchmarks, rows):
    rng = new_rng()
    for number, row in enumerate(rows["stories"]):
        planted = row["context"].upper().replace(" ", ",\n  ")
        text = f"{sentence(rng, 200)} {planted}. {sentence(rng, 50)}"
        assert benchmarks.find(text) == [Item("stories", "test", number)]
    for number, row in enumerate(rows["questions"]):
        assert benchmarks.find(f"Q: {row['question']}?") == [Item("questions", "test", number)]


def test_thirteen_words_in_a_row_are_enough_and_twelve_are_not(benchmarks, rows):
    words = rows["stories"][7]["context"].split()
    assert benchmarks.find(" ".join(words[5:18])) == [Item("stories", "test", 7)]
    assert benchmarks.find(" ".join(words[5:17])) == []
    assert benchmarks.find(" ".join(reversed(words))) == []
    assert benchmarks.find("") == []


def test_texts_without_an_item_give_nothing(benchmarks):
    rng = new_rng()
    assert not any(benchmarks.find(sentence(rng, 300)) for _ in range(200))


def test_what_many_items_begin_with_is_no_item_and_short_items_are_said(tmp_path):
    rng = new_rng()
    form = sentence(rng, 20)
    rows = [{"question": f"{form} {sentence(rng, 20)}"} for _ in range(30)]
    short = [{"question": "two words"}, {"question": sentence(rng, 8)}]
    found = Benchmarks(write_task_data(tmp_path, forms=rows, short=short))
    assert found.find(form) == []
    assert found.find(rows[3]["question"]) == [Item("forms", "test", 3)]
    assert found.items == {"forms": 30, "short": 1}
    assert found.too_short == {"short": 1}


def test_the_certificate_counts_items_and_documents(benchmarks, tmp_path):
    hits = [
        hit("a.jsonl", 1, Item("stories", "test", 4)),
        hit("a.jsonl", 1, Item("stories", "test", 5)),
        hit("b.jsonl", 9, Item("stories", "test", 4)),
        hit("b.jsonl", 9, Item("questions", "test", 0)),
    ]
    write_list(tmp_path / CONTAMINATED_NAME, hits)
    assert list(read_list(tmp_path / CONTAMINATED_NAME)) == hits
    made = contamination.certificate(benchmarks, hits, dropped=True)
    assert made["documents"] == 2 and made["dropped"]
    assert made["tasks"]["stories"] == {
        "items": 100, "too_short": 0, "items_hit": 2, "documents": 2,
    }  # fmt: skip
    assert made["tasks"]["questions"] == {
        "items": 20, "too_short": 0, "items_hit": 1, "documents": 1,
    }  # fmt: skip


def test_other_items_are_other_benchmarks(benchmarks, rows, tmp_path):
    changed = {**rows, "questions": rows["questions"][::-1]}
    assert Benchmarks(write_task_data(tmp_path, **rows)).sha256 == benchmarks.sha256
    other = tmp_path / "other"
    other.mkdir()
    assert Benchmarks(write_task_data(other, **changed)).sha256 != benchmarks.sha256


def test_a_folder_without_task_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\(tasks.json: No such file.*task_data.py --output DIR"):
        Benchmarks(tmp_path)
    (tmp_path / "tasks.json").write_text("{}")
    with pytest.raises(ValueError, match=r"\(tasks.json: it is damaged\)"):
        Benchmarks(tmp_path)


@pytest.mark.parametrize("drop", [False, True])
def test_prepare_counts_the_items_in_a_source_and_drops_them_where_asked(
    rows, tmp_path, tokenizer_file, capsys, drop
):
    rng = new_rng()
    texts = [sentence(rng, 40) for _ in range(300)]
    for number, row in enumerate(rows["stories"]):
        texts[3 * number] += f" {row['context']}"
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    (tmp_path / "tasks").mkdir()
    tasks = write_task_data(tmp_path / "tasks", **rows)
    flags = ["--source=a", f"--input={tmp_path / 'a.jsonl'}", f"--output={tmp_path / 'data'}"]
    flags += [f"--tokenizer={tokenizer_file}", f"--benchmarks={tasks}", "--workers=1"]
    flags += ["--drop-contaminated"] if drop else []
    assert prepare.main(flags) == 0
    assert "stories: 100 of 100 items" in capsys.readouterr().out
    found = manifest.read_manifest(tmp_path / "data/a")
    assert found.train.documents + found.held_out.documents == (200 if drop else 300)
    certificate = found.provenance["contamination"]
    assert certificate["documents"] == 100 and certificate["dropped"] == drop
    assert certificate["tasks"]["stories"]["items_hit"] == 100
    assert certificate["tasks"]["questions"]["items_hit"] == 0
    hits = read_list(tmp_path / "data/a" / CONTAMINATED_NAME)
    assert [row["line"] for row in hits] == [3 * number + 1 for number in range(100)]
    assert prepare.main(flags) == 0
    assert "already prepared" in capsys.readouterr().out


def test_what_is_to_be_dropped_has_to_be_named(tmp_path, capsys):
    flags = ["--source=a", "--input=x", f"--output={tmp_path}", "--drop-contaminated"]
    assert prepare.main(flags) == 2
    assert "--drop-contaminated: only with --benchmarks" in capsys.readouterr().err
