"""plan --recipe: what the sources of a recipe cost, by the sizes that it holds."""

import dataclasses
from pathlib import Path

import pytest

from stablelm_jax import config as config_lib
from stablelm_jax import configs_folder
from stablelm_jax.planning import recipe_costs
from stablelm_jax.preparation.recipes import config_path, load_recipe
from stablelm_jax.run.console import make_console

STABLELM = load_recipe("stablelm_2")


def shown(monkeypatch, capsys, recipe, columns):
    """What is said at so many columns, and the cells of each row by the first of them."""
    monkeypatch.setattr(
        recipe_costs, "make_console", lambda file_width: make_console(file_width=columns)
    )
    recipe_costs.show(recipe, config_lib.load(config_path(recipe)))
    said = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines()]
    return said, {cells[0]: cells[1:] for cells in rows if cells}


def number(cell):
    figure, *unit = cell.replace(",", "").split()
    return float(figure) * {"M": 1e6, "B": 1e9, "T": 1e12}.get("".join(unit), 1)


@pytest.mark.parametrize("columns", [80, 120])
def test_the_published_run_goes_through_its_sources_as_often_as_its_tokens_say(
    monkeypatch, capsys, columns
):
    config = config_lib.load(config_path(STABLELM))
    said, rows = shown(monkeypatch, capsys, STABLELM, columns)
    assert max(map(len, said.splitlines())) <= columns and "…" not in said
    run_tokens = 420_000 * 2048 * 4096
    for source in STABLELM.sources:
        weight = config.data.weights[source.name] / sum(config.data.weights.values())
        epochs = weight * run_tokens / (source.tokens / source.epochs)
        assert rows[source.name][-1] == f"{epochs:.2f}"
    total = sum(source.tokens / source.epochs for source in STABLELM.sources)
    assert list(map(number, rows["all"][1:4])) == pytest.approx(
        [total * 4.3 / 1e9, total, total * 4 / 1e9], rel=1e-3
    )
    assert rows["redpajama_wiki"][2] == "24.29 B"
    assert rows["all"][0] == "13,055+" and "size not known: restruct_v1\n" in said


def test_a_long_name_is_folded_and_no_number_is_cut(monkeypatch, capsys):
    first, *others = STABLELM.sources
    name = "a_name_that_is_far_too_long"
    recipe = dataclasses.replace(STABLELM, sources=(dataclasses.replace(first, name=name), *others))
    said, rows = shown(monkeypatch, capsys, recipe, 80)
    assert max(map(len, said.splitlines())) <= 80 and "…" not in said
    assert ["111", "104", "24.29 B"] == next(c for r, c in rows.items() if name.startswith(r))[:3]


def test_what_nobody_knows_is_no_zero(monkeypatch, capsys):
    said, rows = shown(monkeypatch, capsys, load_recipe("demo"), 80)
    assert rows["all"][:4] == ["?"] * 4
    for stage in recipe_costs.STAGES:
        assert (rows[stage.name][1], rows[stage.name][3]) == ("?", "?")


def test_a_sum_that_lacks_the_tokens_of_a_source_says_so(monkeypatch, capsys):
    # c4 may be filtered and starcoder may not.
    for name, lacking in ("c4", True), ("starcoder", False):
        sources = [
            dataclasses.replace(s, tokens=0, epochs=0.0) if s.name == name else s
            for s in STABLELM.sources
        ]
        recipe = dataclasses.replace(STABLELM, sources=tuple(sources))
        said, rows = shown(monkeypatch, capsys, recipe, 80)
        assert all(cell.endswith("+") for cell in rows["all"][:4])
        assert f"tokens not known: {name}\n" in said
        assert rows["filters: gopher"][1].endswith("+") == lacking
        assert rows["filters: gopher"][3].endswith("+") == lacking


def test_files_that_several_sources_share_are_downloaded_once():
    pile = ("philpapers", "hackernews", "europarl", "freelaw", "dm_math")
    sizes = {s.name: recipe_costs._origin(s).gigabytes for s in STABLELM.sources}
    assert {sizes[name] for name in pile} == {338}
    once = sum(size or 0 for size in sizes.values()) - 4 * 338
    assert sum(size or 0 for size in recipe_costs._downloads(STABLELM)) == pytest.approx(once)


def test_core_hours_follow_from_the_text_that_a_stage_is_for_and_each_speed_has_its_source():
    rows = {row[0]: row for row in recipe_costs._stages(STABLELM)}
    text = {s.name: s.tokens / s.epochs * 4.3 / 1e6 for s in STABLELM.sources}
    web = sum(text[s.name] for s in STABLELM.sources if not s.unfiltered)
    assert rows["read, tokenize, write"][4] == f"{sum(text.values()) / 24.3 / 3600:,.0f}"
    assert rows["near copies: signatures"][4] == f"{web / 1.53 / 3600:,.0f}"
    assert rows["filters: gopher"][1] == "9 of 28"
    assert all(stage.source for stage in recipe_costs.STAGES)


def test_a_config_with_other_sources_is_told_what_the_recipe_lacks(capsys):
    config = config_lib.load(Path(configs_folder()) / "smoke.py")
    recipe_costs.show(load_recipe("demo"), config)
    said = " ".join(capsys.readouterr().out.split())
    assert "in the config's weights, not in the recipe: package_docs, python_docs" in said
    assert "not in the config's weights: libreoffice_help_en" in said
