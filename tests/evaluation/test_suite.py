"""Tasks by name, with data that lies here."""

import json

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
