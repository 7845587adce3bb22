"""Every rule refuses with one line that names the key, its value and what to do."""

import re

import pytest

from stablelm_jax import config as config_lib
from stablelm_jax.config.tree import OPTIMIZERS
from stablelm_jax.kernels import attention, cross_entropy


def small(**overrides):
    """A valid config with `overrides`, whose keys have __ for dots."""
    config = config_lib.default_config()
    values = {
        "model.vocab_size": 100_352,
        "model.num_layers": 2,
        "model.width": 128,
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
        "model.feed_forward_width": 352,
        "data.weights.code": 1.0,
        "data.weights.prose": 0.5,
        "data.batch_size": 12,
        "schedule.peak": 1e-3,
        "schedule.minimum": 1e-4,
        "schedule.warmup_steps": 10,
        "schedule.total_steps": 400,
        "training.num_steps": 300,
    }
    for key, value in (values | {k.replace("__", "."): v for k, v in overrides.items()}).items():
        config_lib.set_value(config, key, value)
    return config


def refusal(config, check=config_lib.validate):
    with pytest.raises(config_lib.ConfigError) as error:
        check(config)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_sound_config_passes():
    config_lib.validate(small())


def test_a_config_may_name_every_kernel_there_is():
    for name in attention.IMPLEMENTATIONS:
        config_lib.validate(small(training__attention=name))
    for name in cross_entropy.IMPLEMENTATIONS:
        config_lib.validate(small(training__cross_entropy=name))


def test_what_reads_no_data_needs_no_tokenizer_and_no_source():
    config = small()
    config.data.weights = {}
    config_lib.set_value(config, "data.tokenizer", None)
    config_lib.validate(config, data=False)
    with pytest.raises(config_lib.ConfigError, match="config.data.tokenizer=not set: may not"):
        config_lib.validate(config)


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("seed", -1, "0 or more and up to 4294967295"),
        ("seed", 2**32, "0 or more and up to 4294967295"),
        ("data__skip", ("web:row",), "names no rows or documents; write 'SOURCE:rows:FIRST-LAST'"),
        ("model__width", 130, "multiple of model.num_heads"),
        ("model__num_kv_heads", 3, "divisor of 4"),
        ("model__rotary_fraction", 0.1, "even number"),
        ("model__vocab_size", 50_304, "use 100352 rows"),
        ("training__cross_entropy", "fused", "auto, reference, saved, tiled"),
        ("training__num_valid_ids", 100_288, "100289 to that; use the number of the tokenizer's"),
        ("training__num_valid_ids", 100_353, "model.vocab_size=100352 allow"),
        ("model__init_std", 0.0, "above 0"),
        ("data__tokenizer", "", "name"),
        ("data__sequence_length", 0, "1 or more"),
        ("data__batch_size", 0, "1 or more"),
        ("data__prefetch_batches", -1, "0 or more"),
        ("data__weights__code", -1.0, "0 or more"),
        ("data__weights__code", float("nan"), "finite"),
        ("data__weights__code", float("inf"), "finite"),
        ("data__weights__code", "much", "0 or more"),
        ("data__weights__code", True, "0 or more"),
        ("data__weights__Code", 1.0, "a letter first"),
        ("data__stages", "code=1", "write STEP:source=weight"),
        ("data__stages", "100:code=1; 50:prose=1", "put them in order"),
        ("data__stages", "100:code=-1", "0 or more"),
        ("data__stages", "100:code=0", "give one above 0"),
        ("data__batch_stages", "100", "write STEP:rows"),
        ("data__batch_stages", "100:0", "write STEP:rows"),
        ("data__batch_stages", "100:8; 100:16", "put them in order"),
        ("data__sequence_stages", "0:", "write STEP:length"),
        (
            "data__sequence_stages",
            "0:1000",
            "1000 does not divide config.data.sequence_length=4096",
        ),
        ("data__sequence_stages", "5:1024; 5:2048", "must rise, from 0 on"),
        ("optimizer__b1", 1.0, "0 or more and below 1"),
        ("optimizer__b2", -0.1, "0 or more"),
        ("optimizer__epsilon", 0.0, "above 0"),
        ("optimizer__weight_decay", -0.1, "0 or more"),
        ("optimizer__clip_norm", 0.0, "above 0"),
        ("schedule__kind", "linear", "hybrid, cosine"),
        ("schedule__peak", 0.0, "above 0"),
        ("schedule__peak", float("nan"), "finite"),
        ("schedule__minimum", 1e-3, "lower it"),
        ("schedule__minimum", -1e-4, "0 or more"),
        ("schedule__transition", 0.5, "below 0.5"),
        ("schedule__total_steps", 0, "1 or more"),
        ("schedule__warmup_steps", 300, "fewer warmup steps"),
        ("schedule__warmup_steps", 101, "fewer warmup steps"),  # the cosine is over at 100
        ("schedule__total_steps", None, "kind=hybrid needs it; set it"),
        ("schedule__kind", "constant", "unset it with --config.schedule.minimum=none"),
        ("schedule__kind", "wsd", "config.schedule.cooldown_start=not set"),
        ("schedule__cooldown_steps", 10, "without config.schedule.cooldown_start"),
        ("schedule__cooldown_kind", "sqrt", "without config.schedule.cooldown_start"),
        (
            "schedule__cooldown_learning_rate",
            1e-4,
            "without config.schedule.cooldown_start",
        ),
        ("schedule__cooldown_end", 1e-5, "without config.schedule.cooldown_start"),
        ("schedule__cooldown_start", 200, "set it"),
        ("training__num_steps", 0, "1 or more"),
        ("training__accumulation", 5, "multiple of 5"),
        ("training__dtype", "float16", "bfloat16, float32"),
        ("training__remat", "some", "none, dots, attention, full"),
        ("training__attention", "flash", "auto, reference, chunked"),
        ("training__log_every", 0, "1 or more"),
        ("parallel__data", 0, "use -1"),
        ("parallel__data", 5, "multiple of 5"),
        ("parallel__model", 0, "1 or more"),
        ("parallel__model", 4, "num_kv_heads"),
        ("checkpoint__every", 0, "1 or more"),
        ("checkpoint__keep_latest", 0, "1 or more"),
        ("checkpoint__keep_every", 1500, "multiple"),
        ("evaluation__every", -1, "0 or more"),
        ("evaluation__max_rows", 0, "1 or more"),
        ("evaluation__tasks_every", 100, "name some in config.evaluation.tasks"),
        ("evaluation__tasks_limit", -1, "0 or more"),
        ("evaluation__tasks", ("",), "give texts"),
        ("samples__temperature", -0.1, "0 or more"),
        ("samples__top_p", 0.0, "above 0"),
        ("samples__top_p", 1.1, "above 0 and up to 1"),
        ("samples__max_new_tokens", 0, "1 or more"),
        ("samples__prompts", ("",), "give texts"),
        ("profile__steps", "13:10", "FIRST:LAST"),
        ("profile__steps", "ten", "FIRST:LAST"),
        ("training__unroll", 0, "1 or more"),
        ("parallel__fsdp", True, "use dots, attention or full"),
        ("name", "", "name"),
    ],
)
def test_an_impossible_value_is_refused_with_its_remedy(key, value, remedy):
    message = refusal(small(**{key: value}))
    assert key.split("__")[-1] in message
    assert remedy in message


def test_dpo_compares_answers_alone():
    message = refusal(small(training__objective="dpo", data__loss_on="all"))
    assert "config.data.loss_on='all'" in message and "leave it at 'answers'" in message


@pytest.mark.parametrize(
    "values",
    [
        {"schedule__warmup_steps": 100},
        {"schedule__warmup_steps": 200, "schedule__shift_warmup": True},
        {"training__num_steps": 4000},  # the hybrid schedule has no end
        {"data__weights__code": 0.0},
        {"data__weights__code": 3},
        {"parallel__data": 3, "training__accumulation": 2},
        {"parallel__model": 2},
        {"checkpoint__keep_every": 2000},
        {"evaluation__every": 0, "samples__every": 0},
        {"samples__temperature": 0.0},
        {"schedule__cooldown_start": 250, "schedule__cooldown_steps": 50},
        {"schedule__cooldown_start": 250, "schedule__cooldown_steps": 80},
        {"schedule__kind": "cosine", "schedule__minimum": 1e-3},
    ],
)
def test_what_is_unusual_but_possible_passes(values):
    config_lib.validate(small(**values))


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"schedule__cooldown_start": 99, "schedule__cooldown_steps": 300}, "cooldown_start=99"),
        (
            {
                "schedule__cooldown_start": 105,
                "schedule__cooldown_steps": 300,
                "schedule__shift_warmup": True,
            },
            "cooldown_start=105",
        ),
        ({"schedule__cooldown_start": 200, "schedule__cooldown_steps": 50}, "num_steps=300"),
        ({"schedule__cooldown_start": 300, "schedule__cooldown_steps": 50}, "num_steps=300"),
        (
            {
                "schedule__kind": "cosine",
                "schedule__cooldown_start": 9,
                "schedule__cooldown_steps": 300,
            },
            "cooldown_start=9",
        ),
    ],
)
def test_a_cooldown_begins_after_the_cosine_and_holds_the_runs_end(values, key):
    assert key in refusal(small(**values))


def test_a_cosine_run_may_not_outlast_its_schedule():
    message = refusal(small(schedule__kind="cosine", schedule__total_steps=299))
    assert "training.num_steps=300" in message
    assert "total_steps=300" in message


def test_a_field_of_another_optimizer_is_refused_and_ademamix_asks_for_its_warmup():
    for kind in OPTIMIZERS:
        fields = {"muon_steps": 6, "lion_b1": 0.5, "ademamix_alpha": 2.0, "b2": 0.5}
        warmup = {"optimizer__ademamix_warmup_steps": 300} if kind == "ademamix" else {}
        for name, value in fields.items():
            config = small(optimizer__kind=kind, **warmup, **{f"optimizer__{name}": value})
            if name.startswith(kind) or (name == "b2" and kind != "lion"):
                config_lib.validate(config)
                continue
            message = refusal(config)
            assert f"config.optimizer.{name}={value}: does nothing without" in message
            assert name == "b2" or f"optimizer.kind={name.split('_')[0]};" in message
    message = refusal(small(optimizer__kind="ademamix"))
    assert "ademamix_warmup_steps=not set" in message and "num_steps=300" in message
    assert "optimizer.kind" in refusal(small(optimizer__kind="adam"))


@pytest.mark.parametrize("kind", ["constant", "wsd", "inverse_sqrt"])
def test_other_schedules_need_no_horizon_and_refuse_what_they_would_ignore(kind):
    values = {"kind": kind, "minimum": None, "total_steps": None, "shift_warmup": False}
    if kind == "wsd":
        values |= {"cooldown_start": 250, "cooldown_steps": 50, "cooldown_kind": "sqrt"}

    def config(**changes):
        return small(**{f"schedule__{k}": v for k, v in (values | changes).items()})

    config_lib.validate(config())
    for name, value in {"minimum": 1e-4, "total_steps": 400, "shift_warmup": True}.items():
        assert "does nothing without" in refusal(config(**{name: value}))
    assert "kind=hybrid;" in refusal(config(transition=0.3))


def test_an_inverse_square_root_needs_a_warmup_to_fall_from():
    values = {"kind": "inverse_sqrt", "minimum": None, "total_steps": None, "warmup_steps": 0}
    assert "use 1 or more" in refusal(small(**{f"schedule__{k}": v for k, v in values.items()}))


def test_weights_that_are_all_zero_or_none_are_refused():
    assert "all weights are 0" in refusal(small(data__weights__code=0.0, data__weights__prose=0.0))
    config = small()
    config.data.weights = {}
    assert "no source to train on" in refusal(config)


@pytest.mark.parametrize(
    "key", ["data.batch_size", "schedule.peak", "training.num_steps", "model.width"]
)
def test_a_field_without_default_must_be_set(key):
    config = small()
    config_lib.set_value(config, key, None)
    assert f"--config.{key}=VALUE" in refusal(config)


def test_a_replaced_group_must_have_every_field_and_no_other():
    config = small()
    config.schedule = {"kind": "cosine"}
    assert "config.schedule.cooldown_end: is missing" in refusal(config)
    config = small()
    config.optimizer = config.optimizer.to_dict() | {"momentum": 0.9}
    assert "config.optimizer.momentum: there is no such field" in refusal(config)


def test_a_value_of_another_type_is_refused():
    config = small()
    config.schedule = config.schedule.to_dict() | {"warmup_steps": 1.5}
    assert "config.schedule.warmup_steps=1.5: is of type float" in refusal(config)


@pytest.mark.parametrize(
    ("values", "num_devices", "mesh"),
    [
        ({}, 1, (1, 1, 1)),
        ({}, 4, (1, 4, 1)),
        ({"parallel__model": 2}, 4, (1, 2, 2)),
        ({"parallel__data": 3, "parallel__model": 2}, 6, (1, 3, 2)),
        ({"parallel__replica": 3, "parallel__model": 2}, 12, (3, 2, 2)),
    ],
)
def test_the_mesh_fills_the_devices(values, num_devices, mesh):
    found = config_lib.validate_mesh(small(**values), num_devices)
    assert found == dict(zip(("replica", "data", "model"), mesh))


@pytest.mark.parametrize(
    ("values", "num_devices", "key"),
    [
        ({"parallel__model": 2}, 3, "parallel.model=2"),
        ({"parallel__data": 3}, 4, "parallel.data=3"),
        ({"parallel__replica": 3}, 4, "parallel.replica=3"),
        ({"parallel__replica": 2, "parallel__model": 4}, 4, "parallel.data=-1"),
        ({"parallel__replica": 8}, 8, "data.batch_size=12"),
        ({}, 8, "data.batch_size=12"),
        ({"training__accumulation": 4}, 6, "data.batch_size=12"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_or_the_batch_is_refused(values, num_devices, key):
    message = refusal(small(**values), lambda c: config_lib.validate_mesh(c, num_devices))
    assert re.match(rf"config\.{key}: .*; use", message)
