"""From a checkpoint to Hugging Face and back: the bits, and what transformers computes."""

import json
import shutil

import jax
import numpy as np
import pytest
from small_models import KINDS, random_params, read_checkpoint, write_checkpoint

from stablelm_jax import convert
from stablelm_jax.interop import from_hf, verify
from stablelm_jax.interop.safetensors_files import INDEX, ONE_FILE
from stablelm_jax.model.parameters import nest
from stablelm_jax.parallel.mesh import make_mesh

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = "the path of the others, in 1889: ça y est, über 3°\n\n  done"


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory, tokenizer_file):
    """(model, its parameters, the checkpoint, its float32 export)."""
    folder = tmp_path_factory.mktemp(request.param)
    model, params = KINDS[request.param], random_params(KINDS[request.param])
    checkpoint = write_checkpoint(folder / "global_step42", model, params, tokenizer_file)
    out = folder / "hf"
    assert run("to-hf", checkpoint, out, "--dtype", "float32", "--no-verify") == 0
    return model, params, checkpoint, out


def run(*arguments):
    return convert.main([str(argument) for argument in arguments])


def test_logits_of_the_export_in_transformers_equal_ours_to_1e_4(exported):
    model, params, _, out = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer.encode(TEXT)
    reference = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    assert reference.dtype == torch.float32
    with torch.no_grad():
        theirs = reference.eval()(torch.tensor([ids])).logits[0].numpy()
    ours = verify.our_logits(model, nest(params), ids)
    assert np.abs(ours).max() > 1  # there is something to compare
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_there_and_back_every_bit_is_the_same_and_biases_that_were_not_there_are_not(
    exported, tmp_path
):
    model, params, _, out = exported
    assert run("from-hf", out, tmp_path / "global_step7", "--no-verify") == 0
    back = read_checkpoint(tmp_path / "global_step7")
    assert back.keys() == params.keys()
    for name, values in params.items():
        np.testing.assert_array_equal(back[name].view(np.uint32), values.view(np.uint32), name)
    assert from_hf.open_directory(out).model == model


def test_in_bfloat16_each_tensor_is_the_nearest_and_an_import_of_it_goes_out_as_the_same_bytes(
    exported, tmp_path
):
    _, params, checkpoint, _ = exported
    assert run("to-hf", checkpoint, tmp_path / "a", "--no-verify") == 0
    assert run("from-hf", tmp_path / "a", tmp_path / "in", "--step", 42, "--no-verify") == 0
    back = read_checkpoint(tmp_path / "in")  # the folder of a checkpoint stands for its newest
    for name, values in params.items():
        rounded = torch.tensor(values).to(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(back[name], rounded, name)
    assert run("to-hf", tmp_path / "in", tmp_path / "b", "--no-verify") == 0
    assert (tmp_path / "a" / ONE_FILE).read_bytes() == (tmp_path / "b" / ONE_FILE).read_bytes()


def test_an_import_split_over_devices_holds_on_each_what_the_sharding_says(exported):
    model, params, _, out = exported
    directory = from_hf.open_directory(out)
    mesh = make_mesh(data=1, model=2, devices=jax.devices()[:2])
    split = from_hf.load_params(directory, mesh)
    leaves = jax.tree_util.tree_leaves_with_path(split)
    assert len(leaves) == len(params)
    for path, leaf in leaves:
        name = "/".join(key.key for key in path)
        np.testing.assert_array_equal(np.asarray(leaf), params[name], name)
    gate = split["layers"]["mlp"]["gate"]["kernel"]
    assert {shard.data.shape for shard in gate.addressable_shards} == {(3, 64, 48)}


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokenizer_file):
    """A checkpoint of the first kind and a bfloat16 export of it in several files."""
    folder = tmp_path_factory.mktemp("small")
    model = KINDS["1.6b"]
    checkpoint = write_checkpoint(
        folder / "global_step3", model, random_params(model), tokenizer_file,
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}", end_ids=[258, 257],
    )  # fmt: skip
    assert run("to-hf", checkpoint, folder / "hf", "--max-file-size", "100KB") == 0
    return checkpoint, folder / "hf"


def test_an_export_in_several_files_has_an_index_and_transformers_loads_it(small):
    _, out = small
    index = json.loads((out / INDEX).read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and files == {path.name for path in out.glob("*.safetensors")}
    stored = sum(
        parameter.numel() * 2
        for parameter in transformers.AutoModelForCausalLM.from_pretrained(out).parameters()
    )
    assert index["metadata"]["total_size"] == stored


def test_what_ends_a_turn_and_the_chat_template_go_out_and_come_back(small, tmp_path):
    checkpoint, out = small
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.is_fast and tokenizer.eos_token == "<|im_end|>"
    messages = [{"role": "user", "content": "the"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "the"
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == [258, 257] and generation.bos_token_id == 257
    again = from_hf.open_directory(out)
    assert again.end_ids == (258, 257)
    assert again.chat_template == "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert again.max_positions == 64


def test_the_card_names_the_branch_and_where_the_weights_come_from(small):
    _, out = small
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert 'revision="global_step3"' in card and "| weights from | `a test` |" in card


def test_an_export_that_stands_is_refused_and_replaced_by_force(small, tmp_path, capsys):
    checkpoint, _ = small
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    assert run("to-hf", checkpoint, out, "--no-verify") == 1
    assert "--force" in capsys.readouterr().err and (out / "mine").read_text() == "keep"
    assert run("to-hf", checkpoint, out, "--no-verify", "--force") == 0
    assert not (out / "mine").exists() and (out / "config.json").exists()


def test_no_force_replaces_a_run_by_its_own_export(small, tmp_path, capsys):
    checkpoint, _ = small
    run_folder = tmp_path / "run"
    copy = run_folder / "checkpoints" / checkpoint.name
    shutil.copytree(checkpoint, copy)
    for direction, out in (("to-hf", run_folder), ("to-hf", copy), ("to-gguf", run_folder)):
        assert run(direction, run_folder, out, "--no-verify", "--force") == 1
        assert f"{out}" in capsys.readouterr().err.splitlines()[-1]
    assert read_checkpoint(copy) and [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_force_replaces_a_file_or_a_link_and_not_what_that_leads_to(small, tmp_path, kind):
    checkpoint, _ = small
    kept, out = tmp_path / "kept", tmp_path / "out"
    kept.mkdir()
    (kept / "mine").write_text("keep")
    out.write_text("old") if kind == "file" else out.symlink_to(kept)
    assert run("to-hf", checkpoint, out, "--no-verify", "--force") == 0
    assert (out / "config.json").exists() and not out.is_symlink()
    assert (kept / "mine").exists()


def test_a_conversion_that_computes_something_else_fails_and_leaves_nothing(
    small, tmp_path, capsys, monkeypatch
):
    checkpoint, _ = small
    wrong = verify.our_logits

    def a_bit_off(model, params, ids):
        params["layers"]["attention"]["query"]["bias"] *= 1.5
        return wrong(model, params, ids)

    monkeypatch.setattr("stablelm_jax.interop.conversions.our_logits", a_bit_off)
    assert run("to-hf", checkpoint, tmp_path / "out") == 1
    assert "is wrong and was removed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_values_too_large_for_float16_are_named(tmp_path, tokenizer_file, capsys):
    model = KINDS["3b"]
    params = random_params(model)
    params["layers/mlp/up/kernel"][1, 2, 3] = 1e5
    checkpoint = write_checkpoint(tmp_path / "global_step0", model, params, tokenizer_file)
    assert run("to-hf", checkpoint, tmp_path / "out", "--dtype", "float16") == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "layers.1.mlp.up_proj.weight" in line and "bfloat16" in line
    assert not (tmp_path / "out").exists()
