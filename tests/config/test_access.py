import json

import pytest
from ml_collections import ConfigDict

from stablelm_jax import config as config_lib
from stablelm_jax.model.config import ModelConfig


def test_the_model_group_has_the_fields_and_defaults_of_the_model():
    group = config_lib.default_config().model.to_dict()
    assert set(group) == set(ModelConfig.__dataclass_fields__)
    for name, field in ModelConfig.__dataclass_fields__.items():
        if group[name] is not None:
            assert group[name] == field.default, name


def test_a_mistyped_field_is_an_error_and_a_new_source_is_not():
    config = config_lib.default_config()
    with pytest.raises(AttributeError):
        config.model.witdh = 3
    with pytest.raises(AttributeError):
        config.trainnig = ConfigDict()
    config.data.weights.mine = 1.0
    assert config.data.weights.mine == 1.0


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("data.batchsize", "data.batch_size"),
        ("batch_size", "data.batch_size"),
        ("modle.width", "model.width"),
        ("optimizer.eps", "optimizer.epsilon"),
        ("training.lr_warmup_steps", "schedule.warmup_steps"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(key, nearest):
    with pytest.raises(config_lib.ConfigError, match=rf"did you mean config\.{nearest}\?"):
        config_lib.set_value(config_lib.default_config(), key, 1)


def test_a_wrong_type_names_the_right_one_also_for_an_unset_field():
    config = config_lib.default_config()
    with pytest.raises(config_lib.ConfigError, match=r"type str; give a value of type int"):
        config_lib.set_value(config, "data.batch_size", "many")
    with pytest.raises(config_lib.ConfigError, match=r"type float; give a value of type int"):
        config_lib.set_value(config, "training.accumulation", 1.5)


def test_a_config_comes_back_from_json_as_it_was():
    config = config_lib.default_config()
    config.data.weights.b = 0.25
    config.data.weights.a = 1.0
    config.samples.prompts = ("one", "two")
    config.schedule.peak = 1e-3
    again = config_lib.from_dict(json.loads(json.dumps(config_lib.to_dict(config))))
    assert list(config_lib.flatten(again)) == list(config_lib.flatten(config))
    assert again.samples.prompts == ("one", "two")


def test_a_dict_from_before_a_field_existed_takes_its_default():
    tree = config_lib.to_dict(config_lib.default_config())
    del tree["training"]["deterministic"]
    assert config_lib.from_dict(tree).training.deterministic is False


def test_a_dict_with_an_unknown_field_is_refused():
    tree = config_lib.to_dict(config_lib.default_config())
    tree["training"]["stpes"] = 3
    with pytest.raises(config_lib.ConfigError, match=r"config\.training\.stpes"):
        config_lib.from_dict(tree)


def test_the_fields_come_by_dotted_key_in_the_order_of_names():
    fields = list(config_lib.flatten(config_lib.default_config()))
    assert fields == sorted(fields, key=lambda field: field[0])
    for field in (("schedule.peak", None), ("optimizer.b2", 0.95), ("data.weights", {})):
        assert field in fields


def test_set_by_says_where_each_value_comes_from():
    config = config_lib.default_config()
    config.data.weights.mine = 1.0
    config.seed = 7
    config.data.batch_size = 8
    origin = config_lib.set_by(config, {"seed": 7, "optimizer": {}})
    assert origin["seed"] == "command line"
    assert origin["optimizer.b1"] == "command line"
    assert origin["data.batch_size"] == "file"
    assert origin["data.weights.mine"] == "file"
    assert origin["training.accumulation"] == "default"


def test_mixture_weights_leave_out_sources_of_weight_zero():
    config = config_lib.default_config()
    config.data.weights = {"b": 2, "a": 0.5, "c": 0.0}
    assert config_lib.mixture_weights(config) == {"a": 0.5, "b": 2.0}
    assert list(config_lib.mixture_weights(config)) == ["a", "b"]
