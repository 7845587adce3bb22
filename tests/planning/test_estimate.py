"""The estimate of a step, against sums worked out by hand and a published program's memory."""

import dataclasses

import pytest

from stablelm_jax import config as config_lib
from stablelm_jax import configs_folder
from stablelm_jax.config.tree import OPTIMIZERS
from stablelm_jax.model.flops import train_flops_per_token
from stablelm_jax.planning.estimate import (
    layout_of,
    least_bytes,
    link_bandwidth,
    matrix_flops,
    orthogonal_flops,
    step_time,
    update_bytes,
)
from stablelm_jax.planning.program import Collective
from stablelm_jax.planning.targets import chips, parse_target

H200 = parse_target("h200:1x1")


def layout(num_devices=1, **settings):
    config = config_lib.load(configs_folder() / "stablelm_2_1_6b.py")
    settings = {"training.accumulation": 256, "training.remat": "none", **settings}
    for key, value in settings.items():
        config_lib.set_value(config, key, value)
    return layout_of(config, num_devices)


def test_without_remat_the_work_is_the_models_own_and_flash_attention_computes_scores_again():
    found = layout()
    model = train_flops_per_token(found.sizes, 4096, causal=True)
    scores = 2 * 24 * 2048 * 4096  # forward, causal, a token
    assert matrix_flops(found) == pytest.approx((model + scores / 2) * 8 * 4096, rel=1e-9)


def test_full_remat_runs_the_layers_forward_once_more_but_never_the_head():
    none, full = layout(), layout(**{"training.remat": "full"})
    layers = 2 * 1_233_000_000 + 2 * 24 * 2048 * 4096
    assert matrix_flops(full) - matrix_flops(none) == pytest.approx(layers * 8 * 4096, rel=1e-3)
    assert matrix_flops(layout(**{"training.remat": "dots"})) == matrix_flops(none)
    kernel_kept = matrix_flops(layout(**{"training.remat": "attention"}))
    assert matrix_flops(none) < kernel_kept < matrix_flops(full)


def test_of_preferences_the_head_runs_twice_forward():
    pairs, text = layout(**{"training.objective": "dpo"}), layout()
    again = 2 * 2048 * 100_352 * text.tokens
    assert matrix_flops(pairs) - matrix_flops(text) == pytest.approx(again)
    assert sum(step_time(pairs, H200)) > sum(step_time(text, H200))


def test_muons_matrices_are_shared_out_by_layers_and_each_optimizers_state_counts():
    muon = {"optimizer.kind": "muon", "training.accumulation": 4}
    one, eight, many = (layout(n, **muon) for n in (1, 8, 64))
    # five turns, by hand: four matrices of 2048 x 2048, three of 2048 x 5632 in each of 24 layers
    turn = 4 * 6 * 2048**3 + 3 * (4 * 2048**2 * 5632 + 2 * 2048**3)
    assert orthogonal_flops(one) == 5 * 24 * turn
    assert orthogonal_flops(eight) == 5 * 3 * turn and orthogonal_flops(many) == 5 * turn
    assert orthogonal_flops(layout()) == 0
    values = {kind: layout(**{"optimizer.kind": kind}).state_values for kind in OPTIMIZERS}
    assert values == {
        **{"adamw": 2, "lion": 1, "ademamix": 3, "schedule_free_adamw": 2},
        "muon": pytest.approx(2 - 1_233_125_376 / 1_644_417_024),
    }
    assert update_bytes(layout()) == 34 * one.parameters  # as AdamW reads and writes
    alike = layout(**{"training.accumulation": 4})
    assert least_bytes(alike) - least_bytes(one) == pytest.approx(4 * 1_233_125_376)


def test_each_way_to_compute_again_takes_longer_than_the_one_before():
    times = [step_time(layout(**{"training.remat": r}), H200) for r in ("none", "dots", "full")]
    assert times[0].memory < times[1].memory == times[2].memory
    assert sum(times[0]) < sum(times[1]) < sum(times[2])


def test_smaller_microbatches_take_longer():
    totals = [
        sum(step_time(layout(**{"training.accumulation": a}), H200)) for a in (256, 512, 2048)
    ]
    assert totals == sorted(totals) and totals[0] < totals[2]


def test_matrix_products_of_few_tokens_take_as_long_as_their_weights_are_read():
    small = layout(**{"data.sequence_length": 1, "training.accumulation": 2048})
    assert step_time(small, H200).matrices == pytest.approx(
        2048 * 2 * 2 * 1_644_417_024 / 4.8e12, rel=1e-6
    )


def test_what_the_compiled_program_sends_takes_the_place_of_the_least():
    target = parse_target("h100:1x8")
    found = [Collective("all-reduce", "data", "f32", 8 * 450 * 10**9, 8, 1)]
    assert step_time(layout(8), target, found).communication == pytest.approx(2 * 7)
    assert 0 < step_time(layout(8), target).communication < 1


@pytest.mark.parametrize(
    "name, model, axis, gb_s",
    [
        ("h100:1x8", 1, "data", 450),  # NVLink
        ("h100:2x8", 1, "data", 400),  # 8 ports of 50
        ("h100:2x8", 2, "data", 200),  # the two rings of a host share its ports
        ("h100:2x8", 2, "model", 450),
        ("a100-40gb:64x8", 8, "data", 25),
        ("v5p:4x4x4", 1, "data", 600),
        ("v5p:4x4x4", 4, "model", 200),
        ("v5p:4x4x4", 4, "data", 400),
    ],
)
def test_links_are_those_that_the_axis_runs_over(name, model, axis, gb_s):
    target = parse_target(name)
    found = layout(target.num_devices, **{"training.accumulation": 1, "parallel.model": model})
    assert link_bandwidth(target, found, axis) == pytest.approx(gb_s * 1e9)


def test_every_chip_has_the_figures_that_an_estimate_needs():
    for name, facts in chips().items():
        links = ("nvlink_gb_s", "network_gb_s")
        links = links if facts["kind"] == "gpu" else ("interconnect_gb_s",)
        assert all(facts[key] > 0 for key in ("bandwidth_gb_s", *links)), name


def test_the_least_memory_is_below_what_the_compiler_needs_and_not_idle():
    """By `plan`, attention `pallas_gpu`: 8 rows on one H200 with dots, the published run, 8 rows
    without remat."""
    published = layout(512, **{"training.accumulation": 2, "training.remat": "full"})
    dots = layout(**{"training.remat": "dots"})
    for found, gib in ((dots, 68.4), (published, 14.0), (layout(), 140.5)):
        assert 0.5 * gib < least_bytes(found) / 2**30 < gib


def test_memory_falls_with_fsdp_with_a_split_model_and_with_remat():
    usual = layout(8, **{"training.accumulation": 32, "training.remat": "dots"})
    for change in ({"fsdp": True}, {"model": 2}, {"remat": "full"}, {"rows": 4}):
        assert least_bytes(dataclasses.replace(usual, **change)) < least_bytes(usual)
