import json

import pytest
from ml_collections import ConfigDict

from stablelm_jax import config as config_lib
from stablelm_jax.config import access
from stablelm_jax.config.tree import FIELDS
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


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("learning_rate", "schedule.peak"),
        ("optimizer.lr", "schedule.peak"),
        ("training.warmup", "schedule.warmup_steps"),
        ("steps", "training.num_steps"),
        ("data.seq_len", "data.sequence_length"),
        ("training.batch_size", "data.batch_size"),
        ("training.weight_decay", "optimizer.weight_decay"),
        ("model.dtype", "training.dtype"),
        ("training.seed", "seed"),
        ("model.hidden_size", "model.width"),
        ("model.n_layers", "model.num_layers"),
        ("max_grad_norm", "optimizer.clip_norm"),
        ("gradient_accumulation_steps", "training.accumulation"),
        ("optimizer.beta2", "optimizer.b2"),
        ("schedule.min_lr", "schedule.minimum"),
        ("training.eval_interval", "evaluation.every"),
        ("training.gradient_checkpointing", "training.remat"),
        ("model.intermediate_size", "model.feed_forward_width"),
        ("model.num_attention_heads", "model.num_heads"),
        ("model.num_key_value_heads", "model.num_kv_heads"),
    ],
)
def test_a_field_under_the_name_that_other_software_has_for_it_is_found(typed, ours):
    with pytest.raises(config_lib.ConfigError, match=rf"did you mean config\.{ours}\?"):
        config_lib.set_value(config_lib.default_config(), typed, 1)


def test_every_name_from_elsewhere_leads_to_a_field_and_none_is_a_field_already():
    assert access._ELSEWHERE.keys() <= FIELDS.keys()
    names = " ".join(access._ELSEWHERE.values()).split()
    assert len(names) == len(set(names))


def small_config():
    config = config_lib.default_config()
    config.data.weights.mine = 1.0
    config.schedule.peak = 1e-3
    return config


def test_a_field_that_an_old_checkpoint_lacks_had_its_default():
    config, saved = small_config(), config_lib.to_dict(small_config())
    del saved["training"]["deterministic"], saved["guard"], saved["data"]["loss_on_first_token"]
    assert config_lib.config_changes(saved, config) == {}
    config.guard.kind = "skip"
    assert config_lib.config_changes(saved, config) == {"guard.kind": ["off", "skip"]}


def test_a_field_that_only_the_checkpoint_has_is_shown_and_can_be_left_out():
    config, saved = small_config(), config_lib.to_dict(small_config())
    saved["optimizer"]["nesterov"] = True
    changes = config_lib.config_changes(saved, config)
    told = config_lib.show_changes(changes)
    assert told == "config.optimizer.nesterov was True, now None"
    again = config_lib.from_dict(saved)
    assert config_lib.to_dict(again) == config_lib.to_dict(config)


def test_a_tuple_and_the_list_that_json_makes_of_it_are_equal():
    config = small_config()
    config.evaluation.tasks = ("a", "b")
    assert config_lib.config_changes(config_lib.to_dict(config), config) == {}
    assert config_lib.differing({"a": 1}, {"a": 1, "b": 2}) == {"b": [None, 2]}
