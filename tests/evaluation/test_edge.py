"""`report --edge`: rows that are measured once, of what is scored the same way, in one table."""

import dataclasses
import json
import types

import pytest
import tiny
from edge_files import config_of, write_files

import stablelm_jax.evaluation
from stablelm_jax import config as config_lib
from stablelm_jax import report
from stablelm_jax.evaluation import edge
from stablelm_jax.evaluation.scores import TaskScore
from stablelm_jax.interop import llama_cpp

pytest.importorskip("cyllama")
SPEED = {
    **{"read_tokens_per_second": 1234.5, "write_tokens_per_second": 56.7, "cores": 2},
    **{"prompt_tokens": 448, "repeats": 5, "memory_bytes": 9_000_000},
}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """f(types, *flags) runs the verb and gives its rows; how often a process was timed."""
    monkeypatch.setattr(llama_cpp, "num_processors", lambda: 1)
    timed = []
    monkeypatch.setattr(edge, "in_fresh_process", lambda *command: timed.append(command) or SPEED)
    data, checkpoint = write_files(tmp_path)
    config = tiny.write_config(config_of(data), tmp_path)

    def run(types, *flags, code=0):
        given = ("--edge", str(checkpoint), "--types", types, "--config", config, "--max-rows", "2")
        assert report.main([*given, *flags]) == code
        file = tmp_path / "edge" / "global_step3" / "edge.json"
        return {row["type"]: row for row in json.loads(file.read_text("utf-8"))}

    return run, timed, tmp_path / "edge" / "global_step3"


def test_every_type_is_measured_once_against_the_checkpoint_and_stands_in_the_table(
    measured, monkeypatch, capsys
):
    run, timed, folder = measured
    first = run("f32,q4_0")
    assert list(first) == ["unquantised", "f32", "q4_0"] and len(timed) == 2
    whole, exact, coarse = first.values()
    assert exact["bits_per_byte"] == pytest.approx(whole["bits_per_byte"], rel=1e-5)
    assert exact["kl_mean"] < 1e-9 < 1e-4 < coarse["kl_mean"] < coarse["kl_p99"]
    assert exact["places"] == coarse["places"] == 2 * 2 * 32 and exact["top1"] == 1
    assert whole["held_out"].keys() == coarse["held_out"].keys()
    assert exact["bits_per_weight"] == 32 and 4.5 <= coarse["bits_per_weight"] < 8.5
    said = capsys.readouterr().out
    assert "1,234" in said and "128 held-out tokens" in said and "Speed on 2 cores" in said
    lines = (folder / "edge.md").read_text("utf-8").splitlines()
    assert lines[0].startswith(
        "| type | MB | bits a weight | nats a token | bits a byte | KL, nats |"
    )
    assert lines[4].startswith("| q4_0 |") and "| 57 | 9 |" in lines[4] and "tasks" not in lines[0]
    assert (folder / "edge.png").read_bytes()[:4] == b"\x89PNG"

    def written_again(*_, **how):
        raise AssertionError(how)

    monkeypatch.setattr(edge, "to_gguf", written_again)
    assert run("f32,q4_0") == first and len(timed) == 2
    assert run("f32", "--speed") == first and len(timed) == 3
    other = run("none", "--max-rows", "1")
    assert list(other) == ["unquantised"] and other["unquantised"]["held_out"]["eval/loss"] > 0


def test_types_and_flags_that_do_not_go_together_are_refused(measured, capsys):
    run, *_ = measured
    for flags in (["--types=q9"], ["--fit"], ["--last=3"]):
        with pytest.raises(SystemExit):
            report.main(["--edge", "a", *flags])
        assert (
            "choose of f32" in (said := capsys.readouterr().err) or "takes one checkpoint" in said
        )


def test_flags_of_edge_are_refused_without_it(capsys):
    for flag in ("--types=q4_0", "--tasks=piqa", "--imatrix=a", "--speed", "--max-rows=3"):
        with pytest.raises(SystemExit):
            report.main(["a", flag])
        assert f"{flag.split('=')[0]}: only with --edge" in capsys.readouterr().err


def test_reading_is_timed_as_a_prompt_and_then_token_by_token():
    calls = []
    found = llama_cpp.time_reading(lambda ids, first: calls.append((len(ids), first)), 300, 2)
    assert calls == [(448, 0)] + 2 * [(448, 0), *((1, place) for place in range(448, 512))]
    assert found["read_tokens_per_second"] > 0 < found["write_tokens_per_second"]


@pytest.fixture
def stubs(measured, monkeypatch):
    """The verb as in `measured`, with no conversion and no scoring; how each file was written."""
    run, _, folder = measured
    written = []

    def to_gguf(checkpoint, path, *, file_type, **how):
        written.append((file_type, how.get("imatrix"), how["force"]))
        if how.get("save_imatrix"):
            how["save_imatrix"].write_bytes(b"matrix")
        path.write_bytes(b"file")

    quality = {"bits_per_byte": 1.0, "held_out": {"eval/loss": 2.0}}
    monkeypatch.setattr(edge, "to_gguf", to_gguf)
    monkeypatch.setattr(edge.Edge, "quality", lambda self, logits: dict(quality))
    model = types.SimpleNamespace(bits_per_weight=4.5, logits=None)
    monkeypatch.setattr(edge, "open_gguf", lambda *_: model)
    monkeypatch.setattr(edge, "draw_edge", lambda *_: None)
    return run, written, folder


def test_a_file_without_a_row_of_the_same_checkpoint_is_written_anew(stubs, tmp_path, capsys):
    run, written, folder = stubs
    folder.mkdir(parents=True)
    (folder / "global_step3-q4_0.gguf").write_bytes(b"of nobody knows what")
    run("q4_0")
    run("q4_0")
    assert written == [("q4_0", None, True)]
    run("q4_0", "--max-rows", "1")  # measured on other rows, and the file is the same
    assert len(written) == 1
    (tmp_path / "other").mkdir()
    other = config_of(tmp_path / "data", **{"data.loss_on_first_token": False})
    rows = run("q4_0", "--config", tiny.write_config(other, tmp_path / "other"))
    assert not rows["q4_0"]["measured"]["loss_on_first_token"] and len(written) == 1
    run("q4_0", "--output", "gs://bucket/edge", code=1)
    assert "gs://bucket/edge: name a folder by --output" in capsys.readouterr().err


def test_importance_is_computed_once_and_belongs_to_the_row(stubs, tmp_path, capsys):
    run, written, folder = stubs
    data = tmp_path / "data"
    rows = run("q4_0,q4_k_m,q5_k_m", "--imatrix", str(data))
    assert list(rows) == ["unquantised", "q4_0", "q4_k_m-imatrix", "q5_k_m-imatrix"]
    matrix = folder / "imatrix.gguf"
    assert [source for _, source, _ in written] == [None, data, matrix]
    assert "q4_k_m-imatrix, q5_k_m-imatrix: the importance matrix is" in capsys.readouterr().out
    (tmp_path / "other.gguf").write_bytes(b"another")
    run("q4_k_m", "--imatrix", str(tmp_path / "other.gguf"))
    run("q4_k_m", "--imatrix", str(matrix))
    assert [source for _, source, _ in written[3:]] == [tmp_path / "other.gguf", matrix]
    assert matrix.exists()
    run("q4_0", "--imatrix", str(data), code=1)
    assert "--imatrix: q4_0 take none" in capsys.readouterr().err


def test_tasks_are_scored_where_they_are_missing_by_the_published_metric(
    stubs, monkeypatch, capsys
):
    run, *_ = stubs
    scored, failed = [], {}

    def evaluate_tasks(model_of, names, **_):
        scored.append(model_of(None))
        values = {"acc": 0.25, "acc_norm": 0.5}
        rows = [
            TaskScore(name, name, metric, "none", 0, value, None, 9, "1")
            for name in names
            for metric, value in values.items()
        ]
        rows.append(TaskScore(names[0], "mmlu_law", "acc", "none", 0, 0.0, None, 9, "1"))
        return {"tasks": [dataclasses.asdict(row) for row in rows]} | failed

    fake = types.SimpleNamespace(
        evaluate_tasks=evaluate_tasks,
        lm_of_gguf=lambda path, saved, told: "file",
        lm_of_checkpoint=lambda saved, mesh, **how: how["dtype"],
    )
    monkeypatch.setattr(stablelm_jax.evaluation, "checkpoint_tasks", fake, raising=False)
    assert "tasks_mean" not in run("q4_0")["q4_0"]
    rows = run("q4_0", "--tasks", "arc_easy,piqa")  # published: acc_norm of one, acc of the other
    assert scored == ["float32", "file"] and rows["q4_0"]["tasks_mean"] == 0.375
    assert run("q4_0") == rows == run("q4_0", "--tasks", "arc_easy,piqa") and len(scored) == 2
    assert "tasks_mean" not in run("none", "--tasks", "piqa")["q4_0"]  # not beside other tasks
    failed["failed"] = {"sciq": "no data"}
    run("q4_0", "--tasks", "sciq", code=1)
    assert "--tasks without scores: {'sciq': 'no data'}" in capsys.readouterr().err


def test_another_checkpoint_of_the_same_name_begins_anew(stubs, tmp_path):
    run, written, _ = stubs
    first = run("q4_0")["q4_0"]["measured"]
    (tmp_path / "global_step3").rename(tmp_path / "before")
    model = config_lib.model_config(config_of(tmp_path / "data"))
    params, tokenizer = tiny.random_params(model, seed=9), tmp_path / "data" / "tokenizer.json"
    tiny.write_checkpoint(tmp_path / "global_step3", model, params, tokenizer)
    assert run("q4_0")["q4_0"]["measured"] != first and len(written) == 2
