"""What a Hugging Face directory may be, and what is said of one that cannot be read."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_models import KINDS, random_params, write_checkpoint

from stablelm_jax import convert
from stablelm_jax.interop import conversions, from_hf, hf_config
from stablelm_jax.interop.safetensors_files import INDEX, ONE_FILE
from stablelm_jax.parallel.mesh import make_mesh

MODEL = KINDS["1.6b"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer_file):
    """A float32 export with norm biases that are not zero."""
    folder = tmp_path_factory.mktemp("whole")
    model = hf_config.ModelConfig(**{**vars(MODEL), "block_norm_bias": True})
    checkpoint = write_checkpoint(
        folder / "global_step0", model, random_params(model), tokenizer_file
    )
    out = folder / "hf"
    assert convert.main(["to-hf", str(checkpoint), str(out), "--dtype=float32", "--no-verify"]) == 0
    return out


@pytest.fixture
def directory(whole, tmp_path):
    """A copy of it, to damage."""
    return shutil.copytree(whole, tmp_path / "hf")


def changed_config(directory, remove=(), **values):
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))


def changed_tensors(directory, change):
    tensors = load_file(directory / ONE_FILE)
    change(tensors)
    save_file(tensors, directory / ONE_FILE)


def refused(directory, capsys):
    """The lines that a failed import says; nothing was written."""
    out = directory.parent / "out"
    assert convert.main(["from-hf", str(directory), str(out), "--no-verify"]) == 1
    assert not out.exists() or not list(out.iterdir())
    lines = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in lines)
    return lines


FLAT = {"rope_theta": 10_000, "partial_rotary_factor": 0.25}
NEW = {"rope_parameters": {"rope_type": "default", **FLAT}}
EPOCH = {
    "model_type": "stablelm_epoch",
    "architectures": ["StableLMEpochForCausalLM"],
    "rope_pct": 0.25,
    "rope_theta": 10_000,
    "norm_eps": 1e-5,
    "num_heads": 4,
    "rotary_scaling_factor": 1.0,
}


@pytest.mark.parametrize(
    ("remove", "values"),
    [
        (("rope_parameters",), FLAT),
        (("rope_theta", "partial_rotary_factor"), NEW),
        (
            ("rope_parameters", "partial_rotary_factor", "layer_norm_eps", "num_attention_heads",
             "use_qkv_bias"),
            EPOCH,
        ),
        (("rope_parameters",), {**FLAT, "rope_scaling": {"rope_type": "default"}}),
        (("rope_parameters",), {**FLAT, "rope_scaling": {"type": "default", "factor": 2.0}}),
        (("rope_parameters",), {**FLAT, "rope_scaling": {}}),
        (("rope_theta",), {**NEW, "rope_scaling": None}),
    ],
    ids=[
        *("flat rope keys", "rope_parameters", "stablelm_epoch"),
        *("rope_scaling default", "type default", "rope_scaling empty", "rope_scaling null"),
    ],
)  # fmt: skip
def test_configs_old_and_new_are_the_same_model(directory, remove, values):
    meant = from_hf.open_directory(directory)
    changed_config(directory, remove, **values)
    read = from_hf.open_directory(directory)
    assert read.model == meant.model and read.model.block_norm_bias and read.model.qkv_bias


def test_the_buffers_of_old_files_are_passed_over(directory):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)

    changed_tensors(directory, add)
    assert from_hf.open_directory(directory).model.num_layers == MODEL.num_layers


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_values_are_read_exactly_from_either_float_type(directory, dtype):
    stored = load_file(directory / ONE_FILE)
    rounded = {name: x.astype(dtype) for name, x in stored.items()}
    save_file(rounded, directory / ONE_FILE)
    params = from_hf.load_params(from_hf.open_directory(directory), make_mesh())
    theirs = rounded["model.layers.2.mlp.down_proj.weight"].astype(np.float32).T
    np.testing.assert_array_equal(np.asarray(params["layers"]["mlp"]["down"]["kernel"])[2], theirs)


def test_missing_unknown_and_misshapen_tensors_are_all_listed(directory, capsys):
    def damage(tensors):
        for layer in (0, 2):
            del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
        tensors["lm_head.bias"] = np.zeros(3, np.float32)
        tensors["model.norm.weight"] = np.zeros(63, np.float32)

    changed_tensors(directory, damage)
    lines = refused(directory, capsys)
    assert "  missing: model.layers.*.mlp.up_proj.weight (layers 0, 2)" in lines
    assert "  unknown: lm_head.bias" in lines
    assert "  misshapen: model.norm.weight is [63], not [64]" in lines
    assert "2 missing, 1 unknown, 1 misshapen" in lines[-1]


def test_another_architecture_is_named(directory, capsys):
    changed_config(directory, model_type="llama")
    (line,) = refused(directory, capsys)
    assert "'llama'" in line and "stablelm" in line


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"tie_word_embeddings": True}, "unknown: lm_head.weight"),
        ({"rope_parameters": {"rope_type": "yarn", **FLAT}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"num_key_value_heads": 3}, "num_kv_heads 3"),
        ({"vocab_size": 512}, "misshapen"),
        ({"rope_parameters": "plain"}, "rope_parameters is 'plain'"),
    ],
)
def test_a_config_that_we_do_not_compute_is_refused(directory, capsys, values, said):
    changed_config(directory, **values)
    assert said in "\n".join(refused(directory, capsys))


def test_a_file_cut_short_is_named(directory, capsys):
    path = directory / ONE_FILE
    path.write_bytes(path.read_bytes()[:-100])
    (line,) = refused(directory, capsys)
    assert ONE_FILE in line and "fetch it again" in line


def test_a_file_of_noise_is_named(directory, capsys):
    (directory / ONE_FILE).write_bytes(np.random.default_rng(0).bytes(5000))
    (line,) = refused(directory, capsys)
    assert ONE_FILE in line and "fetch it again" in line


def test_values_that_are_not_finite_are_named_and_nothing_is_written(directory, capsys):
    def spoil(tensors):
        tensors["model.layers.1.self_attn.k_proj.weight"][3, 4] = np.nan

    changed_tensors(directory, spoil)
    line = refused(directory, capsys)[-1]
    assert "model.layers.1.self_attn.k_proj.weight" in line and "not finite" in line


def test_an_index_that_names_a_file_which_is_not_there(directory, capsys):
    tensors = load_file(directory / ONE_FILE)
    (directory / ONE_FILE).unlink()
    weight_map = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    weight_map["lm_head.weight"] = "model-00002-of-00002.safetensors"
    head = tensors.pop("lm_head.weight")
    save_file(tensors, directory / "model-00001-of-00002.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (line,) = refused(directory, capsys)
    assert "model-00002-of-00002.safetensors" in line
    save_file({"other": head}, directory / "model-00002-of-00002.safetensors")
    assert "lm_head.weight" in refused(directory, capsys)[-1]
    save_file({"lm_head.weight": head}, directory / "model-00002-of-00002.safetensors")
    assert len(from_hf.open_directory(directory).path.name) > 0


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(directory, capsys, content):
    (directory / INDEX).write_text(content)
    (line,) = refused(directory, capsys)
    assert INDEX in line


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_json_that_is_no_object_is_named(directory, capsys, name):
    (directory / name).write_text("[]")
    (line,) = refused(directory, capsys)
    assert name in line and "no object" in line


@pytest.mark.parametrize("end", [9999, "</s>", [0, -1]])
def test_an_end_of_text_that_is_no_token_is_named(directory, capsys, end):
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    (line,) = refused(directory, capsys)
    assert "eos_token_id is" in line and "384 rows" in line


def test_a_negative_step_is_no_step(directory, capsys):
    with pytest.raises(SystemExit) as left:
        convert.main(["from-hf", str(directory), str(directory / "in"), "--step=-1"])
    assert left.value.code == 2 and "'-1' is no step" in capsys.readouterr().err


def test_ctrl_c_leaves_nothing(directory, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversions, "prompt_ids", interrupted)  # once all is written
    with pytest.raises(KeyboardInterrupt):  # `run_verb` says it in one line
        convert.main(["from-hf", str(directory), str(tmp_path / "in")])
    assert not (tmp_path / "in").exists() or not list((tmp_path / "in").iterdir())


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows(directory, capsys):
    path = directory / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["model"]["vocab"]["surplus"] = 5000
    path.write_text(json.dumps(spec))
    (line,) = refused(directory, capsys)
    assert "5000" in line and "384" in line


def test_no_tokenizer_says_how_to_name_one(directory, capsys):
    (directory / "tokenizer.json").unlink()
    (line,) = refused(directory, capsys)
    assert "--tokenizer" in line


@pytest.mark.parametrize("files", [(), ("config.json",)])
def test_a_directory_that_is_something_else(tmp_path, capsys, files):
    directory = tmp_path / "other"
    directory.mkdir()
    (directory / "notes.txt").write_text("nothing")
    for name in files:
        (directory / name).write_text('{"model_type": "stablelm"}')
    (line,) = refused(directory, capsys)
    assert str(directory) in line


def test_no_directory(tmp_path, capsys):
    (line,) = refused(tmp_path / "nowhere", capsys)
    assert "nowhere" in line


def test_pickled_weights_are_not_read_but_named(directory, capsys):
    (directory / ONE_FILE).rename(directory / "pytorch_model.bin")
    (line,) = refused(directory, capsys)
    assert "pytorch_model.bin" in line and "safetensors" in line


def test_two_steps_that_differ_are_a_question(directory, capsys):
    out = directory.parent / "global_step5"
    assert convert.main(["from-hf", str(directory), str(out), "--step=6"]) == 1
    assert "names step 5" in capsys.readouterr().err
