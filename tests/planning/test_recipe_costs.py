"""plan --recipe: what the sources of a recipe cost, by the sizes that it holds."""

import re
from pathlib import Path

import pytest

from stablelm_jax import config as config_lib
from stablelm_jax import configs_folder
from stablelm_jax.planning import recipe_costs
from stablelm_jax.preparation.recipes import config_path, load_recipe

STABLELM = load_recipe("stablelm_2")


def numbers(line):
    return [float(text.replace(",", "")) for text in re.findall(r"[\d,]+\.?\d*(?=\s)", line)]


def test_the_published_run_goes_through_its_sources_as_often_as_its_tokens_say(capsys):
    config = config_lib.load(config_path(STABLELM))
    recipe_costs.show(STABLELM, config)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 120
    said = said.replace("│", " ")
    rows = {row.split()[0]: row for row in said.splitlines() if row.strip()}
    run_tokens = 420_000 * 2048 * 4096
    for source in STABLELM.sources:
        weight = config.data.weights[source.name] / sum(config.data.weights.values())
        epochs = weight * run_tokens / (source.tokens / source.epochs)
        assert rows[source.name].split()[-1] == f"{epochs:.2f}"
    total = sum(source.tokens / source.epochs for source in STABLELM.sources)
    assert numbers(rows["all"])[1:4] == pytest.approx(
        [total * 4.3 / 1e9, total, total * 4 / 1e9], rel=1e-3
    )


def test_files_that_several_sources_share_are_downloaded_once():
    pile = ("philpapers", "hackernews", "europarl", "freelaw", "dm_math")
    sizes = {s.name: recipe_costs._origin(s).gigabytes for s in STABLELM.sources}
    assert {sizes[name] for name in pile} == {338}
    once = sum(size or 0 for size in sizes.values()) - 4 * 338
    assert recipe_costs._download(STABLELM) == pytest.approx(once)


def test_core_hours_follow_from_the_text_that_a_stage_is_for_and_each_speed_has_its_source():
    rows = {row[0]: row for row in recipe_costs._stages(STABLELM)}
    text = {s.name: s.tokens / s.epochs * 4.3 / 1e6 for s in STABLELM.sources}
    web = sum(text[s.name] for s in STABLELM.sources if not s.unfiltered)
    assert rows["read, tokenize, write"][4] == f"{sum(text.values()) / 10 / 3600:,.0f}"
    assert rows["near copies: signatures"][4] == f"{web / 0.67 / 3600:,.0f}"
    assert rows["filters: gopher"][1] == "9 of 28"
    assert all(stage.source for stage in recipe_costs.STAGES)


def test_a_config_with_other_sources_is_told_what_the_recipe_lacks(capsys):
    config = config_lib.load(Path(configs_folder()) / "smoke.py")
    recipe_costs.show(load_recipe("demo"), config)
    said = " ".join(capsys.readouterr().out.split())
    assert "in the config's weights, not in the recipe: package_docs" in said
    assert "not in the config's weights: libreoffice_help_en" in said
