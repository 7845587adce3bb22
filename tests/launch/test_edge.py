"""launch/edge.sh, with Python replaced by one that takes notes; flags of launch/edge_others.py."""

import runpy
from pathlib import Path

import pytest


def test_each_program_has_its_own_environment_and_all_rows_end_in_one_table(checkout):
    done = checkout.run("launch/edge.sh", "runs/demo", "--data", "the data")
    assert done.returncode == 0, done.stderr
    assert checkout.installed() == [["--editable", f".[{x}]"] for x in ("edge", "mlx", "openvino")]
    flags = ["runs/demo", "--data", "the data"]
    tables = checkout.calls("stablelm_jax.report")
    assert tables == [["--edge", *flags], ["--edge", *flags, "--types", "none"]]
    script = str(checkout.root / "launch/edge_others.py")
    assert checkout.calls(script) == [[program, *flags] for program in ("mlx", "openvino")]
    again = checkout.run("launch/edge.sh", "runs/demo")
    assert again.returncode == 0 and len(checkout.installed()) == 3


def test_flags_of_the_report_may_stand_before_the_checkpoint_and_mistyped_ones_are_errors(capsys):
    script = runpy.run_path(str(Path(__file__).parents[2] / "launch/edge_others.py"))
    given = script["arguments"](["mlx", "--types", "q8_0", "--max-rows", "3", "runs/a"])
    assert (given.checkpoint, given.max_rows) == ("runs/a", 3)
    with pytest.raises(SystemExit):
        script["arguments"](["mlx", "runs/a", "--max-row", "3"])
    assert "--max-row" in capsys.readouterr().err


def test_without_a_checkpoint_it_says_how_it_is_used(checkout):
    done = checkout.run("launch/edge.sh")
    assert done.returncode == 1 and "usage: bash launch/edge.sh CHECKPOINT" in done.stderr
