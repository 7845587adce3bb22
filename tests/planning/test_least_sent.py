"""The least that a device must send, against numbers worked out by hand."""

import dataclasses

import pytest

from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import count_parameters
from stablelm_jax.planning.estimate import Layout, least_sent

SIZES = ModelConfig(
    vocab_size=1000,
    num_layers=3,
    width=64,
    num_heads=4,
    num_kv_heads=4,
    feed_forward_width=128,
    qkv_bias=False,
    final_norm_bias=False,
)
PARAMETERS = count_parameters(SIZES)
# Two matrices of vocabulary x width and a norm's scale lie outside the layers.
OUTSIDE = 2 * 1000 * 64 + 64

ZERO1 = Layout(
    sizes=SIZES,
    sequence_length=128,
    rows=2,
    accumulation=4,
    data=8,
    model=1,
    remat="dots",
    zero1=True,
    fsdp=False,
    dtype_bytes=2,
    reduce_bytes=4,
)


def over_data(**changes):
    return least_sent(dataclasses.replace(ZERO1, **changes))["data"]


def test_zero1_sends_float32_gradients_and_weights_in_the_compute_type_once_a_step():
    assert over_data() == (4 + 2) * PARAMETERS * 7 / 8
    assert over_data(accumulation=1) == over_data()
    assert over_data(reduce_bytes=2) == (2 + 2) * PARAMETERS * 7 / 8


def test_whole_masters_need_an_all_reduce_which_is_two_passes():
    assert over_data(zero1=False) == 2 * 4 * PARAMETERS * 7 / 8


def test_fsdp_sends_once_a_microbatch_and_gathers_layers_twice():
    layers = PARAMETERS - OUTSIDE
    assert over_data(fsdp=True) == 4 * (4 * PARAMETERS + 2 * PARAMETERS + 2 * layers) * 7 / 8


def test_between_groups_only_what_the_scatter_left_is_summed():
    grouped = dataclasses.replace(ZERO1, replica=3)
    assert least_sent(grouped)["data"] == least_sent(ZERO1)["data"]
    assert least_sent(grouped)["replica"] == 2 * 4 * PARAMETERS / 8 * 2 / 3
    assert least_sent(ZERO1)["replica"] == 0


def test_one_device_sends_nothing():
    assert least_sent(dataclasses.replace(ZERO1, data=1)) == dict.fromkeys(
        ("replica", "data", "model"), 0
    )


@pytest.mark.parametrize(
    "parallel_residual, remat, sums_a_layer",
    [
        (False, "dots", 4),
        (False, "attention", 5),
        (False, "full", 5),
        (True, "dots", 2),
        (True, "full", 2),
    ],
)
def test_a_split_model_sums_activations_in_every_layer(parallel_residual, remat, sums_a_layer):
    sizes = dataclasses.replace(SIZES, parallel_residual=parallel_residual)
    layout = dataclasses.replace(ZERO1, sizes=sizes, model=2, remat=remat)
    tokens = 2 * 128
    sums = 2 * (3 * sums_a_layer + 2) * tokens * 64 + 3 * 4 * tokens
    assert least_sent(layout)["model"] == 4 * 2 * sums / 2
    split = 2 * 3 * 64 + 64  # the norms' scales stay whole on both devices
    if not parallel_residual:
        held = split + (PARAMETERS - split) / 2
        assert least_sent(layout)["data"] == 6 * held * 7 / 8


def test_muon_sends_each_device_its_part_of_the_momentum_to_whole_layers_and_back():
    matrices = 3 * (4 * 64 * 64 + 3 * 64 * 128)
    extra = over_data(muon_steps=5) - over_data()
    assert extra == 2 * 4 * matrices / 8 * 7 / 8
    assert over_data(muon_steps=5, zero1=False) - over_data(zero1=False) == 4 * matrices * 7 / 8
