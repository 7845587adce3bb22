"""The tree of runs, and the verb that shows it."""

import io
import shutil

import pytest
from rich.console import Console
from tiny import bare_config, train

from stablelm_jax import runs
from stablelm_jax.reporting import tree
from stablelm_jax.reporting.tree import find_runs, relatives, run_tree


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """A run `main` and two branches of its step 12."""
    folder = tmp_path_factory.mktemp("runs")
    train(bare_config(data), folder / "main")
    parent = {"branch.parent": str(folder / "main/checkpoints/global_step12")}
    cooldown = {"schedule.cooldown_start": 10, "schedule.cooldown_steps": 4}
    for name, schedule in (("cooldown", cooldown), ("constant", {})):
        config = bare_config(data, **parent, **schedule, **{"training.num_steps": 14})
        train(config, folder / name)
    return folder


def lines_of(folder):
    """(indentation, first word, whole line) of every line below the title."""
    console = Console(width=300, file=io.StringIO())
    console.print(run_tree(list(find_runs(folder)), "runs"))
    lines = [line for line in console.file.getvalue().splitlines()[1:] if line.strip()]
    return [(line.index("── "), line.split("── ")[1].split(" ")[0], line) for line in lines]


def test_branches_hang_under_the_checkpoint_they_came_from(folder):
    lines = lines_of(folder)
    order = [word for _, word, _ in lines]
    depth = {word: indentation for indentation, word, _ in lines}
    main, constant, cooldown = (str(folder / name) for name in ("main", "constant", "cooldown"))
    assert order.index(main) == 0 and depth[constant] == depth[cooldown]
    assert order[order.index(constant) - 1] == "global_step12"
    assert depth[cooldown] > depth["global_step8"] > depth[main]
    assert "learning rate from 10 to 14 linear to 0" in lines[order.index(cooldown)][2]


def test_a_run_knows_what_it_started_from_and_what_started_from_it(folder, tmp_path):
    main, step12 = folder / "main", folder / "main/checkpoints/global_step12"
    assert relatives(main) == ("", [(12, folder / "constant"), (12, folder / "cooldown")])
    assert relatives(folder / "cooldown") == (str(main / "global_step12"), [])
    alone = shutil.copytree(folder / "cooldown", tmp_path / "alone")
    assert relatives(alone) == (str(step12), []) and relatives(tmp_path / "none") == ("", [])


def test_a_branch_whose_parent_is_elsewhere_stands_at_the_top_and_says_so(folder, tmp_path):
    shutil.copytree(folder / "cooldown", tmp_path / "cooldown")
    lines = lines_of(tmp_path)
    assert str(folder / "main") in lines[0][2] and "which is of no run here" in lines[0][2]


def test_runs_of_weights_hang_under_their_parents_whatever_their_steps(data, folder, tmp_path):
    """Of base, sft and dpo the steps begin anew: sft has more of them than the base has."""
    main = tmp_path / "main"
    shutil.copytree(folder / "main", main)
    steps = {"branch.state": "weights", "checkpoint.every": 3, "training.num_steps": 3}
    for name, parent in (("sft", main / "checkpoints/global_step4"), ("dpo", tmp_path / "sft")):
        train(bare_config(data, **steps, **{"branch.parent": str(parent)}), tmp_path / name)
    lines = lines_of(tmp_path)
    depth = {word: indentation for indentation, word, _ in lines}
    assert depth[str(main)] < depth[str(tmp_path / "sft")] < depth[str(tmp_path / "dpo")]
    labels = {word: line for _, word, line in lines}
    assert "weights alone of its parent" in labels[str(tmp_path / "dpo")]
    picture = tmp_path / "curves.png"
    assert runs.main([str(tmp_path), "--picture", str(picture)]) == 0 and picture.exists()


def test_a_damaged_checkpoint_is_marked(folder, tmp_path):
    shutil.copytree(folder / "main", tmp_path / "main")
    shutil.rmtree(tmp_path / "main/checkpoints/global_step8/run")
    damaged = [word for _, word, line in lines_of(tmp_path) if line.endswith("damaged")]
    assert damaged == ["global_step8"]


def test_the_verb_prints_the_tree_and_draws_the_curves_where_asked(folder, tmp_path, capsys):
    assert runs.main([str(folder)]) == 0
    assert "global_step12" in capsys.readouterr().out
    picture = tmp_path / "branches.png"
    assert runs.main([str(folder), "--picture", str(picture)]) == 0
    assert picture.stat().st_size > 10_000


def test_a_folder_without_runs_is_an_error_with_a_remedy(tmp_path, capsys):
    assert runs.main([str(tmp_path)]) == 1
    assert "no run with a checkpoint in it or below; name a" in capsys.readouterr().err


def test_a_run_that_was_moved_is_found_through_its_link_once(folder, tmp_path):
    (tmp_path / "moved").symlink_to(folder / "main")
    (tmp_path / "again").symlink_to(tmp_path)  # a link that leads back
    assert [run.path for run in find_runs(tmp_path)] == [tmp_path / "moved"]
    shutil.copytree(folder / "main", tmp_path / "own")
    (tmp_path / "best").symlink_to(tmp_path / "own")
    assert tmp_path / "best" not in [run.path for run in find_runs(tmp_path)]


def test_a_picture_that_cannot_be_written_is_found_before_the_runs_are_read(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(tree, "find_runs", lambda folder: pytest.fail("it began"))
    assert runs.main([str(tmp_path), "--picture", str(tmp_path / "none/p.png")]) == 1
    assert "none/p.png: No such file" in capsys.readouterr().err
