"""`evaluate`: held-out text on whatever devices are there, tasks, JSON, errors that help."""

import json
from unittest import mock

import pytest
from task_files import write_task
from tiny import SOURCES, tiny_config, train, write_config

from stablelm_jax import evaluate
from stablelm_jax.evaluation import checkpoint_tasks

ASKS_FOR_TOO_MUCH = """
task: bad
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["x"], max_gen_toks: 5000}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """(checkpoint, its last metrics line with held-out losses)."""
    workdir = tmp_path_factory.mktemp("run")
    few = {"training.num_steps": 4, "samples.every": 0, "evaluation.max_rows": 10_000}
    _, lines = train(tiny_config(data, **few), workdir)
    return workdir / "checkpoints/global_step4", lines[-1]


def evaluated(capsys, *arguments):
    code = evaluate.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out) if out else None


def test_rows_and_devices_of_another_size_give_the_losses_of_the_training(trained, capsys):
    checkpoint, line = trained
    flags = ("--checkpoint", checkpoint, "--model", 2, "--batch-tokens", 96)
    found = evaluated(capsys, *flags)
    expected = {key: value for key, value in line.items() if key.startswith("eval/")}
    for what in ("perplexity", "documents", "loss_stderr"):
        assert {f"eval/{what}/{source}" for source in SOURCES} < set(expected)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6)


def test_kernels_of_the_chip_that_trained_are_not_asked_for_here(trained, data, tmp_path, capsys):
    kernels = {"training.norms": "pallas_gpu", "training.attention": "pallas_mosaic"}
    config = write_config(tiny_config(data, **kernels, **{"evaluation.max_rows": 10_000}), tmp_path)
    found = evaluated(capsys, "--checkpoint", trained[0], "--config", config)
    assert found["eval/loss"] == pytest.approx(trained[1]["eval/loss"], rel=1e-6)


def test_tasks_are_run_alone_and_written_with_versions(trained, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    task, output = write_task(tmp_path, "one_of_three", items=5), tmp_path / "scores.json"
    flags = ("--tasks", task, "--limit", 3, "--num-fewshot", 1, "--output", output)
    assert evaluated(capsys, "--checkpoint", trained[0].parent, *flags) is None
    found = json.loads(output.read_text())
    score = found["tasks"][0]
    assert (score["task"], score["metric"], score["items"]) == ("one_of_three", "acc", 3)
    assert score["shots"] == 1 and "lm_eval" in found["versions"]
    assert "eval/loss" not in found and found["step"] == 4


def test_tasks_of_a_chat_are_asked_in_its_template_which_the_scores_name(trained, tmp_path, capsys):
    suite = pytest.importorskip("stablelm_jax.evaluation.suite")
    flags = ["--checkpoint", str(trained[0]), "--tasks", str(write_task(tmp_path, "a_chat", 3))]
    assert evaluate.main([*flags, "--chat"]) == 1
    assert "came with no chat template" in capsys.readouterr().err.splitlines()[-1]
    seen, run = [], suite.evaluate
    with mock.patch.object(suite, "evaluate", lambda **how: seen.append(how) or run(**how)):
        found = evaluated(capsys, *flags, "--chat", "zephyr", "--limit", 2)
    assert found["chat_template"]["name"] == "zephyr" and found["tasks"][0]["items"] == 2
    assert found["chat_template"]["enders"] == ["<|endoftext|>"]
    assert seen[0]["apply_chat_template"] is seen[0]["fewshot_as_multiturn"] is True


def test_a_task_that_fails_costs_no_other_its_scores(trained, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    good = write_task(tmp_path, "good", items=3)
    bad = write_task(tmp_path, "bad", items=3)
    bad.write_text(ASKS_FOR_TOO_MUCH.format(data=bad.with_suffix(".jsonl")))
    flags = ["--checkpoint", str(trained[0]), "--tasks", f"{bad},{good}"]
    assert evaluate.main(flags) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert {score["task"] for score in found["tasks"]} == {"good"}
    assert list(found["failed"]) == [str(bad)] and "5000" in found["failed"][str(bad)]
    assert err.strip().splitlines()[-1].startswith("evaluate: tasks without scores: ")


def test_a_published_model_that_is_not_known_is_refused(trained, capsys):
    pytest.importorskip("lm_eval")
    flags = ["--checkpoint", str(trained[0]), "--tasks", "piqa", "--compare", "gpt-9"]
    assert evaluate.main(flags) == 1
    assert "choose one of stablelm-2-1_6b" in capsys.readouterr().err


def test_a_number_that_json_lacks_is_null_and_costs_no_other(capsys, monkeypatch):
    found = {"tasks": [{"value": float("nan")}, {"value": 0.5}], "eval/loss": float("inf")}
    monkeypatch.setattr(evaluate, "_evaluate", lambda arguments: found)
    assert evaluated(capsys, "--checkpoint", "global_step4") == {
        "tasks": [{"value": None}, {"value": 0.5}],
        "eval/loss": None,
    }


@pytest.mark.parametrize("place", ["none/x.json", ".", "file/x.json"])
def test_a_place_for_the_scores_that_takes_none_is_found_before_the_work(
    tmp_path, place, capsys, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(evaluate, "_evaluate", lambda arguments: pytest.fail("it began"))
    assert evaluate.main(["--checkpoint", "c", "--output", str(tmp_path / place)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"evaluate: {tmp_path / place}")


def test_scores_that_cannot_be_written_after_all_are_printed(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "out"
    folder.mkdir()

    def evaluated_while_the_folder_goes(arguments):
        folder.rmdir()
        return {"eval/loss": 2.5}

    monkeypatch.setattr(evaluate, "_evaluate", evaluated_while_the_folder_goes)
    assert evaluate.main(["--checkpoint", "c", "--output", str(folder / "x.json")]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"eval/loss": 2.5} and "No such file" in err


def test_a_failure_of_the_tasks_costs_the_held_out_scores_nothing(trained, capsys, monkeypatch):
    pytest.importorskip("lm_eval")

    def fail(*_, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(checkpoint_tasks, "evaluate_tasks", fail)
    monkeypatch.setattr(evaluate, "_held_out", lambda *_: {"eval/loss": 2.5})
    flags = ["--checkpoint", str(trained[0]), "--tasks", "piqa", "--data", "somewhere"]
    assert evaluate.main(flags) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["eval/loss"] == 2.5 and "out of memory" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--tasks", ""), ("--tasks", "a,,b"), ("--tasks", " "), ("--config", ""), ("--data", "")],
)
def test_an_empty_name_is_a_bad_argument(flag, value, capsys):
    with pytest.raises(SystemExit) as left:
        evaluate.main(["--checkpoint", "c", flag, value])
    assert left.value.code == 2
    assert f"{flag} is empty" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--contamination {listed}", "--contamination: only with --tasks"),
        ("--num-fewshot 0", "--num-fewshot: only with --tasks"),
        ("--compare gpt-9", "--compare: only with --tasks"),
        ("--tasks piqa --contamination nowhere", "nowhere: no source there has a contaminated"),
    ],
)
def test_flags_of_tasks_are_looked_at_before_any_work(flags, message, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "contaminated.jsonl").touch()
    with pytest.raises(SystemExit) as left:
        evaluate.main(["--checkpoint", "c", *flags.format(listed=tmp_path).split()])
    assert left.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
