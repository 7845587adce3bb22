"""Tasks by name, with data that lies here."""

import json
from importlib.util import find_spec

import pytest
from task_files import write_task

pytest.importorskip("lm_eval")
suite = pytest.importorskip("stablelm_jax.evaluation.suite")
pyarrow = pytest.importorskip("pyarrow")


def write_index(folder, name, rows, **entry):
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    task = {"files": {"validation": "rows.parquet"}, "changes": {}, "note": "", **entry}
    (folder / "tasks.json").write_text(json.dumps({"tasks": {name: task}}))


def test_data_that_lies_here_takes_the_place_of_the_hubs(tmp_path):
    row = {"goal": "Open a jar", "sol1": "turn the lid", "sol2": "drop it", "label": 0}
    changes = {"training_split": None}
    write_index(tmp_path, "piqa", [row], changes=changes, note="one item")
    (asked,) = suite.load_tasks(["piqa"], tmp_path)
    (task,) = asked.loaded["tasks"].values()
    assert asked.notes == {"piqa": "one item"}
    (document,) = task.eval_docs
    assert task.doc_to_text(document) == "Question: Open a jar\nAnswer:"  # lm-eval's own prompt


def test_a_task_without_data_says_where_it_could_come_from(tmp_path):
    write_index(tmp_path, "piqa", [{"goal": "x"}], files={"validation": "missing.parquet"})
    with pytest.raises(ValueError, match="'piqa' cannot be loaded.*--task-data"):
        suite.load_tasks(["piqa"], tmp_path)


def test_an_unknown_task_is_refused_with_the_nearest_name(monkeypatch):
    known = suite.TaskManager(include_path=[suite.GROUPS], include_defaults=False)
    # To read all of lm-eval's would take half a minute.
    monkeypatch.setattr(suite, "TaskManager", lambda **_: known)
    with pytest.raises(ValueError, match="no task 'stablelm2_quik'; did you mean 'stablelm2_quic"):
        suite.load_tasks(["stablelm2_quik"])


def test_a_folder_without_task_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no task data"):
        suite.load_tasks(["piqa"], tmp_path)


def test_our_groups_name_tasks_that_lm_eval_has(monkeypatch):
    """Without their data: each member is looked up, none is loaded."""
    import yaml

    names = [path.stem for path in suite.GROUPS.glob("*.yaml")]
    assert len(names) == 4
    known = set(suite._manager(names).all_tasks)
    for name in names:
        group = yaml.safe_load((suite.GROUPS / f"{name}.yaml").read_text())
        assert {member["task"] for member in group["task"]} <= known


def test_a_path_is_a_task_file(tmp_path):
    path = write_task(tmp_path, "my_own", items=3)
    (asked,) = suite.load_tasks([str(path)])
    assert list(asked.loaded["tasks"]) == ["my_own"]


IFEVAL = {
    "key": 1,
    "prompt": "Say it in two sentences without commas.",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_sentences"],
    "kwargs": [{}, {"relation": "at least", "num_sentences": 2}],
}


class Says:
    """A model that says the same to every prompt; what it was asked is in `asked`."""

    rank, world_size, tokenizer_name = 0, 1, "none"

    def __init__(self, text):
        self.text, self.asked = text, []

    def apply_chat_template(self, messages, add_generation_prompt=True):
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)

    def generate_until(self, requests, **_):
        self.asked += [request.args[0] for request in requests]
        return [self.text] * len(requests)


@pytest.mark.skipif(find_spec("langdetect") is None, reason="lm-eval[ifeval] is not installed")
def test_ifeval_runs_on_data_that_lies_here_in_a_chat(tmp_path, monkeypatch):
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", lambda *_: pytest.fail("it asks the network"))
    # A splitter without abbreviations: its files may be empty.
    punkt = tmp_path / "nltk_data/tokenizers/punkt_tab/english"
    punkt.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (punkt / name).touch()
    write_index(tmp_path, "ifeval", [IFEVAL], files={"train": "rows.parquet"})
    asked = suite.load_tasks(["ifeval"], tmp_path)
    failed = []
    for text, expected in (("Yes. It is so.", 1.0), ("Yes, it is.", 0.0)):
        model, options = Says(text), {"bootstraps": 0, "chat": True}
        scores = suite.run_tasks(model, asked, failed=lambda *why: failed.append(why), **options)
        assert not failed
        found = {score.key: score.value for score in scores}
        assert found["ifeval/prompt_level_strict_acc"] == expected
        assert model.asked == [f"<user>{IFEVAL['prompt']}"]


def test_a_package_that_a_task_needs_is_named(tmp_path, monkeypatch):
    def load(*_):
        raise ImportError("No module named 'langdetect'")

    monkeypatch.setattr(suite.TaskManager, "load", load)
    with pytest.raises(ValueError, match="'langdetect'; pip install -e '.\\[eval\\]'"):
        suite.load_tasks(["ifeval"])


class PrefersTheFirst(Says):
    """Finds the first of two answers likelier."""

    def loglikelihood(self, requests):
        return [(0.0 if "first" in request.args[1] else -1.0, False) for request in requests]


def test_scores_of_items_that_the_training_text_does_not_hold_stand_beside(tmp_path):
    rows = [{"goal": f"{i}", "sol1": "first", "sol2": "second", "label": i % 2} for i in range(10)]
    write_index(tmp_path, "piqa", rows, changes={"training_split": None})
    asked = suite.load_tasks(["piqa"], tmp_path)
    failed = []
    scores = suite.run_tasks(
        PrefersTheFirst(""), asked, touched={"piqa": {0, 2, 4}}, bootstraps=0, failed=failed.append
    )
    (accuracy,) = (score for score in scores if score.metric == "acc")
    assert not failed and accuracy.value == 0.5 and accuracy.items == 10
    assert accuracy.untouched == pytest.approx(2 / 7) and accuracy.untouched_items == 7
    (plain, *_) = suite.run_tasks(PrefersTheFirst(""), asked, bootstraps=0, failed=failed.append)
    assert plain.untouched is None


def test_items_that_sources_list_are_those_of_the_split_that_is_asked(tmp_path):
    checkpoint_tasks = pytest.importorskip("stablelm_jax.evaluation.checkpoint_tasks")
    rows = [{"goal": "x", "sol1": "a", "sol2": "b", "label": 0}]
    write_index(tmp_path, "piqa", rows, changes={"training_split": None})
    asked = suite.load_tasks(["piqa"], tmp_path)
    assert checkpoint_tasks.touched_items([], asked) == {"piqa": set()}
    lists = []
    for name, split, number in (("a", "validation", 3), ("b", "validation", 5), ("c", "train", 7)):
        (tmp_path / "data" / name).mkdir(parents=True)
        row = {"file": "f", "line": 1, "task": "piqa", "split": split, "item": number}
        lists.append(tmp_path / "data" / name / "contaminated.jsonl")
        lists[-1].write_text(json.dumps(row) + "\n")
    assert checkpoint_tasks.touched_items(lists, asked) == {"piqa": {3, 5}}
