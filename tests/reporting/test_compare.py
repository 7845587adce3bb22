"""Runs compared: those whose difference is known, those that pair exactly, those that do not."""

import json
import shutil

import numpy as np
import pytest
from tiny import tiny_config, train

from stablelm_jax import report
from stablelm_jax.checkpoint.reading import sealed
from stablelm_jax.reporting.compare import compare

STEPS, TOKENS, SOURCES = 400, 2048, ("code", "web")
EVERY = {"evaluation.every": 4, "samples.every": 0}


def write_run(folder, losses, every=1, source=0.0, documents=None, rows=1, **config):
    """A run folder of `losses` of each step; `source` sets the two sources apart.

    `documents`: {step: nats of each}, of 100 tokens. `rows`: times the rows of a step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(every, len(losses) + 1, every):
        tokens = {f"tokens/{name}": rows * TOKENS // 2 * step for name in SOURCES}
        loss = losses[step - every : step].mean()
        by_source = {"loss/code": loss - source, "loss/web": loss + source}
        line = {"step": step, "time": 1e9 + step, "loss": loss, **by_source, **tokens}
        lines.append(line | {"tokens_seen": rows * TOKENS * step, "step_seconds": 0.5} | SPEED)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fields = {"seed": 1234, "training": {"num_steps": len(losses)}} | config
    (folder / "config.json").write_text(json.dumps({"config": fields}))
    for step, nats in (documents or {}).items():
        (folder / "held_out").mkdir(exist_ok=True)
        found = {"web": {"language": "en", "nll": list(nats), "tokens": [100] * len(nats)}}
        (folder / f"held_out/global_step{step}.json").write_text(json.dumps(found))
    return str(folder)


SPEED = {"tokens_per_second": 4096.0}


def noise(rng, coefficient, size=STEPS):
    drawn = rng.normal(size=size)
    for step in range(1, size):
        drawn[step] += coefficient * drawn[step - 1]
    return drawn


def test_equal_runs_differ_by_0_in_95_of_100_seeds_and_a_better_one_by_its_rate(tmp_path):
    """Both read the same rows, whose difficulty is most of the noise and falls out of the pairs."""
    holds, recovered, told = [], [], []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        curve = 3 + 4 / np.sqrt(1 + np.arange(200)) + 0.3 * rng.normal(size=200)
        a = write_run(tmp_path / "a", curve)
        b = write_run(tmp_path / "b", curve + 0.01 * noise(rng, 0.5, 200))
        c = write_run(tmp_path / "c", curve - 0.02 + 0.01 * noise(rng, 0.5, 200))
        found = compare(a, b, 160).trained.by_source["all"].difference
        better = compare(a, c, 160).trained.by_source["all"].difference
        holds.append(found.is_zero_within)
        recovered.append(better.low <= -0.02 <= better.high)
        told.append(better.high < 0)
    print(f"seeds 0 to 99: 0 is held by {sum(holds)}, the rate by {sum(recovered)}")
    assert 90 <= sum(holds) <= 99 and 90 <= sum(recovered) <= 99 and sum(told) == 100


def test_sources_are_told_apart_and_lines_of_another_interval_are_gathered(tmp_path):
    rng = np.random.default_rng(3)
    curve = 4 + noise(rng, 0.2)
    a = write_run(tmp_path / "a", curve)
    b = write_run(tmp_path / "b", curve, every=5, source=0.125)
    found = compare(a, b, 100).trained
    assert (found.first, found.last, found.by_source["web"].count) == (300, 400, 20)
    means = {name: row.difference.mean for name, row in found.by_source.items()}
    assert means == pytest.approx({"all": 0.0, "code": -0.125, "web": 0.125}, abs=1e-9)
    assert found.by_source["all"].a == pytest.approx(curve[300:].mean())


def test_what_two_runs_have_in_common_is_left_out(tmp_path):
    curve = 4 + noise(np.random.default_rng(4), 0.2)
    a = write_run(tmp_path / "a", curve)
    branch = np.where(np.arange(STEPS) < 350, curve, curve - 1)
    found = compare(a, write_run(tmp_path / "b", branch), 400)
    assert found.trained.first == 350 and found.trained.by_source["all"].difference.mean == -1.0
    assert any("equal up to step 350" in note for note in found.notes)
    unfinished = write_run(tmp_path / "b", branch[:380], training={"num_steps": 400})
    found = compare(a, unfinished, 10)
    assert found.trained.last == 380 and any("at step 380 of 400" in n for n in found.notes)


def test_worth_is_read_off_the_curve_and_foretold_beyond_it(tmp_path):
    """Of a loss that falls by 0.5 with each doubling; B is as good as 1.5, 2 and 8 times A."""
    curve, rng = np.full(STEPS, 4.0), np.random.default_rng(8)
    steps, spread = (50, 100, 200, 400), rng.normal(size=40)
    of = {step: 100 * (6 - 0.5 * np.log2(step / 50) + 0.3 * spread) for step in steps}
    a = write_run(tmp_path / "a", curve, documents=of)
    for name, step, times in (("b", 200, 1.5), ("c", 400, 2.0), ("d", 400, 8.0)):
        nats = of[step] - 100 * 0.5 * np.log2(times) + rng.normal(size=40)
        found = compare(a, write_run(tmp_path / name, curve, documents={step: nats}))
        worth, tokens = found.worth, step * TOKENS
        if times == 8:
            assert worth.tokens is None and worth.most == pytest.approx(4 * tokens)
            continue
        assert worth.tokens == pytest.approx(times * tokens, rel=0.02)
        assert worth.low < worth.tokens < worth.high < 1.1 * times * tokens
        assert (worth.tokens > worth.measured) == (name == "c")
    worse = {400: of[100] + rng.normal(size=40)}
    found = compare(a, write_run(tmp_path / "e", curve, documents=worse))
    assert found.worth.tokens == pytest.approx(100 * TOKENS, rel=0.03)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """`same` and `again` are one run twice, `faster` has another peak."""
    folder = tmp_path_factory.mktemp("runs")
    for name, settings in {"same": {}, "again": {}, "faster": {"schedule.peak": 2e-2}}.items():
        train(tiny_config(data, **EVERY, **settings), folder / name)
    return folder


def test_one_run_twice_differs_by_exactly_0(folder):
    found = compare(str(folder / "same"), str(folder / "again"), 12)
    assert found.changes == {} and found.notes == []
    for part in (found.trained, found.evaluated):
        assert {"all", "fibonacci", "squares"} <= part.by_source.keys()
        for row in part.by_source.values():
            assert row.a == row.b and row.difference.mean == 0.0
    interval = found.evaluated.by_source["all"].difference
    assert (interval.low, interval.high, interval.is_zero_within) == (0.0, 0.0, True)
    assert found.worth.tokens == pytest.approx(found.evaluated.tokens_b)
    assert found.costs[0].tokens == 12 * 8 * 32 and found.costs[0].wall_hours > 0


def test_another_rate_is_named_and_pairs_with_the_metrics(folder):
    found = compare(str(folder / "same"), str(folder / "faster"), 8)
    assert found.changes == {"schedule.peak": [0.01, 0.02]}
    losses = {
        name: [json.loads(line) for line in (folder / name / "metrics.jsonl").open()]
        for name in ("same", "faster")
    }
    last = [[x["eval/loss"] for x in losses[n] if "eval/loss" in x][-1] for n in losses]
    row = found.evaluated.by_source["all"]
    assert [row.a, row.b] == pytest.approx(last, abs=1e-6)
    assert row.difference.mean == pytest.approx(last[1] - last[0], abs=1e-6)
    trained = [[x["loss"] for x in losses[n] if x["step"] > 4 and "loss" in x] for n in losses]
    means = [np.mean(values) for values in trained]
    row = found.trained.by_source["all"]  # weighted by all tokens, `loss` by those that count
    assert row.difference.mean == pytest.approx(means[1] - means[0], abs=0.02)


def changed(folder, path, change):
    """The run `same` once more, its last checkpoint's item `run` as `change` makes it."""
    shutil.copytree(folder / "same", path)
    file = path / "checkpoints/global_step12/run/metadata"
    item = json.loads(file.read_text())
    change(item)
    file.write_text(json.dumps(sealed(item)))
    return compare(str(folder / "same"), str(path))


def test_runs_that_do_not_read_the_same_rows_are_compared_on_held_out_text_alone(folder, tmp_path):
    found = changed(folder, tmp_path / "seed", lambda item: item["row_order"].update(seed=7))
    assert found.trained is None and found.evaluated.by_source["all"].count == 16
    assert any("seed 1234 and 7" in note for note in found.notes)
    curve = np.full(12, 4.0)
    documents = {6: [1.0, 2.0], 12: [1.0, 2.0]}
    a = write_run(tmp_path / "a", curve, documents=documents)
    b = write_run(tmp_path / "b", curve, documents=documents, rows=2)
    found = compare(a, b)
    assert found.trained is None and any("other tokens of" in note for note in found.notes)
    assert (found.evaluated.step_a, found.evaluated.step_b) == (12, 6)
    assert found.evaluated.tokens_a == found.evaluated.tokens_b


def test_other_data_pairs_in_nothing(folder, tmp_path):
    def other(item):
        item["data_hash"], item["source_hashes"] = "0", {"fibonacci": "1", "squares": "2"}

    found = changed(folder, tmp_path / "data", other)
    assert found.trained is None and found.evaluated is None and found.worth is None
    assert any("other data" in note for note in found.notes)
    assert any("not the same in both: fibonacci, squares" in note for note in found.notes)


def test_losses_of_other_tokens_are_not_compared(folder, tmp_path):
    with pytest.raises(ValueError, match="have other tokenizers .* as evaluate --checkpoint gives"):
        changed(folder, tmp_path / "b", lambda item: item.update(tokenizer_sha256="0"))


def test_the_verb_prints_each_comparison_with_the_first_and_writes_them(folder, tmp_path, capsys):
    names = [str(folder / name) for name in ("same", "again", "faster")]
    assert report.main([*names, "--json", str(tmp_path / "found.json"), "--last", "6"]) == 0
    shown = capsys.readouterr().out
    assert "config.schedule.peak: A 0.01, B 0.02" in shown
    assert "No difference can be told" in shown and "training, steps 7 to 12" in shown
    again, faster = json.loads((tmp_path / "found.json").read_text())
    assert again["trained"]["by_source"]["all"]["difference"]["mean"] == 0.0
    assert faster["changes"] == {"schedule.peak": [0.01, 0.02]}


def test_what_is_no_run_is_one_line(folder, tmp_path, capsys):
    assert report.main([str(folder / "same"), str(tmp_path)]) == 1
    assert "neither metrics.jsonl nor config.json has anything to show" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        report.main([str(folder / "same"), str(folder / "again"), "--last", "some"])
    assert "'some' is no number of steps; write 100" in capsys.readouterr().err
