"""The train step, compiled for real chips that are not here (extra `aot`)."""

import pytest
from tiny import tiny_config

from stablelm_jax import config as config_lib
from stablelm_jax.model.parameters import count_parameters
from stablelm_jax.planning.compile import DoesNotFit, compile_for
from stablelm_jax.planning.targets import parse_target
from stablelm_jax.training.programs import pairs_of_a_row

pytestmark = pytest.mark.aot


def step_for(data, target, **overrides):
    settings = {
        "data.batch_size": 32,
        "training.accumulation": 2,
        "training.dtype": "bfloat16",
        "training.remat": "full",
        **overrides,
    }
    config = tiny_config(data, **settings)
    return config, compile_for(config, parse_target(target))


@pytest.mark.parametrize(
    "target, microbatches",
    [
        ("h100:1x8", 2),
        pytest.param("h100:1x8", 1, marks=pytest.mark.by_hand),
        pytest.param("a100-40gb:1x8", 2, marks=pytest.mark.by_hand),
    ],
)
def test_zero1_reduces_once_a_step_in_float32_and_gathers_once_in_bfloat16(
    data, target, microbatches
):
    config, step = step_for(data, target, **{"training.accumulation": microbatches})
    parameters = count_parameters(config_lib.model_config(config))
    large = {c.kind: c for c in step.collectives if c.size > 1000}
    assert set(large) == {"reduce-scatter", "all-gather"}
    scatter, gather = large["reduce-scatter"], large["all-gather"]
    assert (scatter.dtype, scatter.count, scatter.axis) == ("f32", 1, "data")
    assert (gather.dtype, gather.count, gather.axis) == ("bf16", 1, "data")
    assert scatter.size == pytest.approx(4 * parameters, rel=0.01)
    assert gather.size == pytest.approx(2 * parameters, rel=0.01)


@pytest.mark.by_hand
def test_fsdp_gathers_and_scatters_layer_by_layer(data):
    config, step = step_for(data, "a100-40gb:1x8", **{"parallel.fsdp": True})
    large = {(c.kind, c.dtype): c for c in step.collectives if c.size > 1000}
    assert set(large) == {("reduce-scatter", "f32"), ("all-gather", "bf16")}
    layers, microbatches = config.model.num_layers, config.training.accumulation
    # forward and again in the backward pass of every layer; embedding, final norm and head beside
    assert large["all-gather", "bf16"].count >= 2 * layers * microbatches
    assert large["reduce-scatter", "f32"].count >= layers * microbatches


@pytest.mark.by_hand
@pytest.mark.parametrize("fsdp", [False, True])
def test_tensor_parallelism_gathers_neither_logits_nor_gradients(data, fsdp):
    overrides = {"parallel.model": 4, "parallel.fsdp": fsdp, "training.accumulation": 1}
    config, step = step_for(data, "h100:1x8", **overrides)
    large = {(c.kind, c.axis): c for c in step.collectives if c.size > 1000}
    # over `model` only sums go, and over `data` each device's own part of the weights
    assert set(large) == {
        ("all-reduce", "model"),
        ("reduce-scatter", "data"),
        ("all-gather", "data"),
    }
    part = count_parameters(config_lib.model_config(config)) / 4
    assert large["reduce-scatter", "data"].size == pytest.approx(4 * part, rel=0.05)
    # the head's share of `model`: row maxima, sums and targets, and the gradient of its input
    rows = step.rows * config.data.sequence_length
    (head,) = (c for c in step.collectives if (c.axis, c.dtype) == ("model", "f32"))
    width, vocabulary = config.model.width, config.model.vocab_size
    assert head.size <= 4 * rows * (width + 3) < 4 * rows * vocabulary


@pytest.mark.by_hand
def test_a_gpu_program_beyond_the_memory_is_an_error_that_names_what_is_not_tried_yet(
    data, monkeypatch
):
    from stablelm_jax.planning import targets

    monkeypatch.setattr(targets, "_GPU_SHARE_OF_MEMORY", 1e-6)
    with pytest.raises(
        DoesNotFit, match="a device needs .* and has 0.0 GiB; try more mi"
    ) as refused:
        step_for(data, "a100-40gb:1x1", **{"training.accumulation": 2, "training.remat": "full"})
    said = str(refused.value)
    assert "--config.training.accumulation=4" in said and "remat" not in said


def test_without_data_a_row_is_planned_for_as_many_pairs_as_it_may_have(data):
    config = tiny_config(data, **{"data.sequence_length": 4096})
    assert pairs_of_a_row(config) is None
    config.training.objective = "dpo"
    assert pairs_of_a_row(config) == 64


@pytest.mark.by_hand
def test_a_step_of_preferences_is_compiled_with_as_many_pairs_as_a_row_may_have(data):
    objective = {"training.objective": "dpo", "data.packing": "best_fit"}
    _, step = step_for(data, "h100:1x8", **objective, **{"data.sequence_length": 128})
    assert step.pairs == 2 and 0 < step.argument_bytes < step.peak_bytes
