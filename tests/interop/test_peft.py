"""Adapters to PEFT and back: what PEFT computes with them, and what it writes."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_models import KINDS, random_params, write_checkpoint

from stablelm_jax import convert
from stablelm_jax.checkpoint.reading import read_run, state_hash
from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.interop.peft_files import CONFIG, WEIGHTS, read_adapters, write_adapters
from stablelm_jax.interop.verify import our_logits
from stablelm_jax.model.lora import Lora
from stablelm_jax.parallel.mesh import make_mesh

LORA = Lora(3, 8.0, ("query", "value", "out", "down"))
IDS = list(range(5, 45))


def run(*arguments):
    return convert.main([str(argument) for argument in arguments])


OTHERS = [pytest.param(kind, marks=pytest.mark.by_hand) for kind in KINDS if kind != "1.6b"]


@pytest.fixture(scope="module", params=["1.6b", *OTHERS])
def parent(request, tmp_path_factory, tokenizer_file):
    model = KINDS[request.param]
    path = tmp_path_factory.mktemp(request.param) / "global_step42"
    return write_checkpoint(path, model, random_params(model), tokenizer_file)


def written(folder, model, **changed):
    """A directory of PEFT's with random adapters, and these by name; `changed`: in its config."""
    rng = np.random.default_rng(0)
    flat = {r.name: np.float32(rng.normal(0, 0.2, r.shape)) for r in LORA.table(model)}
    write_adapters(folder, model, LORA, flat, "base")
    if changed:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **changed}))
    return flat


def test_taken_adapters_may_predict_what_their_parent_may(parent, tmp_path, monkeypatch):
    written(tmp_path / "peft", SavedModel.open(parent).model)
    monkeypatch.setattr(SavedModel, "num_valid_ids", 77)
    out = tmp_path / "global_step7"
    assert run("from-peft", tmp_path / "peft", out, "--parent", parent, "--no-verify") == 0
    monkeypatch.undo()
    assert SavedModel.open(out).num_valid_ids == 77


def logits_of(checkpoint):
    own = SavedModel.open(checkpoint)
    return our_logits(own.model, own.load(make_mesh(1, 1, jax.devices()[:1])), IDS)


@pytest.mark.parity
def test_what_peft_computes_and_writes_is_what_we_read_and_write(parent, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    base = tmp_path / "hf"
    assert run("to-hf", parent, base, "--dtype", "float32", "--no-verify") == 0

    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")

    def logits(model):
        with torch.no_grad():
            return model.eval()(torch.tensor([IDS])).logits[0].numpy()

    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for config in (
        {"r": 3, "lora_alpha": 8, "target_modules": modules},
        {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    ):
        torch.manual_seed(0)
        settings = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config)
        theirs = peft.get_peft_model(load(), settings)
        saved, taken = tmp_path / f"theirs{config['r']}", tmp_path / f"taken{config['r']}"
        theirs.save_pretrained(saved)
        assert run("from-peft", saved, taken, "--parent", parent) == 0
        expected = logits(theirs)
        assert np.abs(expected - logits(load())).max() > 0.1  # the adapters do something
        np.testing.assert_allclose(logits_of(taken), expected, rtol=0, atol=1e-4)
        back = tmp_path / f"back{config['r']}"
        assert run("to-peft", taken, back, "--base", base) == 0
        again = peft.PeftModel.from_pretrained(load(), back)
        np.testing.assert_allclose(logits(again), expected, rtol=0, atol=2e-5)
        ours, before = load_file(back / WEIGHTS), load_file(saved / WEIGHTS)
        assert ours.keys() == before.keys()
        assert all(np.array_equal(ours[name], before[name]) for name in before)


def test_there_and_back_every_bit_is_the_same(parent, tmp_path):
    model = SavedModel.open(parent).model
    flat = written(tmp_path / "peft", model)
    assert run("from-peft", tmp_path / "peft", tmp_path / "global_step7", "--parent", parent) == 0
    item = read_run(tmp_path / "global_step7")
    assert item["lora"]["parent_hash"] == state_hash(read_run(parent)["checksums"])
    assert run("to-peft", tmp_path / "global_step7", tmp_path / "back") == 0
    lora, back = read_adapters(tmp_path / "back", model)
    assert (lora.scale, set(lora.targets)) == (LORA.scale, set(LORA.targets))
    assert all(np.array_equal(back[name], flat[name]) for name in flat)
    config = json.loads((tmp_path / "back" / CONFIG).read_text())
    assert config["target_modules"] == ["down_proj", "o_proj", "q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == str(parent)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"use_dora": True}, "use_dora is True, which our adapters do not have"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "is of no LoRA"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which may"),
        ({"lora_alpha": None}, "lora_alpha is None, no number above 0"),
        ({"r": 4}, r"lora_A.weight is \[3, 64\], not \[4, 64\]"),
    ],
)
def test_adapters_that_ours_cannot_be_are_refused_by_name(tmp_path, changed, told):
    written(tmp_path / "peft", KINDS["1.6b"], **changed)
    with pytest.raises(ValueError, match=told):
        read_adapters(tmp_path / "peft", KINDS["1.6b"])


@pytest.mark.parametrize("lost", ["lora_A", "lora_B"])
def test_adapters_without_their_other_half_are_refused(tmp_path, lost):
    written(tmp_path / "peft", KINDS["1.6b"])
    stored = load_file(tmp_path / "peft" / WEIGHTS)
    kept = {name: value for name, value in stored.items() if lost not in name}
    save_file(kept, tmp_path / "peft" / WEIGHTS)
    with pytest.raises(ValueError, match=f"holds no .*{lost}.weight: it is not whole"):
        read_adapters(tmp_path / "peft", KINDS["1.6b"])


def test_adapters_of_another_model_or_of_none_are_refused(parent, tmp_path, capsys):
    model = KINDS["1.6b"]
    written(tmp_path / "peft", model)
    stored = load_file(tmp_path / "peft" / WEIGHTS)
    odd = "base_model.model.lm_head.lora_A.weight"
    save_file({**stored, odd: np.zeros((3, 64), np.float32)}, tmp_path / "peft" / WEIGHTS)
    with pytest.raises(ValueError, match=f"such as {odd}, are of no matrix"):
        read_adapters(tmp_path / "peft", model)
    (tmp_path / "peft" / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"holds no {WEIGHTS}"):
        read_adapters(tmp_path / "peft", model)
    assert run("to-peft", parent, tmp_path / "out") == 1
    assert "holds whole weights, no adapters; use convert to-hf" in capsys.readouterr().err
