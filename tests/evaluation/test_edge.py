"""`report --edge`: rows that are measured once, of what is scored the same way, in one table."""

import json

import pytest
import tiny
from edge_files import config_of, write_files

from stablelm_jax import report
from stablelm_jax.evaluation import edge
from stablelm_jax.interop import llama_cpp

pytest.importorskip("cyllama")
SPEED = {
    **{"read_tokens_per_second": 1234.5, "write_tokens_per_second": 56.7, "cores": 2},
    **{"prompt_tokens": 48, "repeats": 5, "memory_bytes": 9_000_000},
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


def test_reading_is_timed_as_a_prompt_and_then_token_by_token():
    calls = []
    found = llama_cpp.time_reading(lambda ids, first: calls.append((len(ids), first)), 300, 40, 2)
    assert calls == [(40, 0)] + 2 * [(40, 0), *((1, place) for place in range(40, 104))]
    assert found["read_tokens_per_second"] > 0 < found["write_tokens_per_second"]
