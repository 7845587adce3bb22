"""A checkpoint as a GGUF file: what is in it, what other programs make of it, what is refused."""

import dataclasses
import importlib.metadata
import json
import sys
import sysconfig
import unicodedata
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import TokenType
from small_models import KINDS, random_params, write_checkpoint
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from stablelm_jax import convert
from stablelm_jax.interop import gguf_export, llama_cpp, tokenizer_files, verify
from stablelm_jax.interop.gguf_export import stored_tensors
from stablelm_jax.interop.gguf_tokens import vocabulary
from stablelm_jax.model.parameters import nest
from stablelm_jax.tokenizer.tokenizer import PATTERN, SPECIAL_TOKENS, load_tokenizer
from stablelm_jax.tokenizer.train_tokenizer import train

# Rows of 80 values are two and a half blocks of the types with blocks.
MODEL = dataclasses.replace(KINDS["1.6b"], feed_forward_width=80)
TEXT = "the path of the others, in 1889: ça y est\n\n  done"


@pytest.fixture(scope="module", params=KINDS)
def written(request, tmp_path_factory, tokenizer_file):
    """(model, its parameters, its float32 file)."""
    folder = tmp_path_factory.mktemp(request.param)
    model, params = KINDS[request.param], random_params(KINDS[request.param])
    checkpoint = write_checkpoint(folder / "global_step42", model, params, tokenizer_file)
    out = folder / "model.gguf"
    assert run("to-gguf", checkpoint, out, "--type", "f32", "--no-verify") == 0
    return model, params, out


@pytest.fixture(scope="module")
def f32_file(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("f32") / "model.gguf"
    assert run("to-gguf", checkpoint, out, "--type", "f32", "--no-verify") == 0
    return out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_file):
    folder = tmp_path_factory.mktemp("checkpoint")
    chat = {"end_ids": [258], "chat_template": "{{ messages }}"}
    params = random_params(MODEL)
    return write_checkpoint(folder / "global_step7", MODEL, params, tokenizer_file, **chat)


def run(*arguments):
    return convert.main([str(argument) for argument in arguments])


# --- tensors ---


def test_every_parameter_comes_back_and_biases_that_were_not_there_are_zero(written):
    model, params, out = written
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(out).tensors}
    read = {name: np.full_like(values, np.nan) for name, values in params.items()}
    for stored in stored_tensors(model, "f32"):
        values = found.pop(stored.name)
        if stored.tensor.absent:
            assert not values.any(), stored.name
        else:
            stored.tensor.put(read[stored.tensor.ours], values)
    assert not found
    for name, values in params.items():
        np.testing.assert_array_equal(read[name], values, name)


# Largest error of a stored value: a share of the largest of its block, and what float16 leaves.
# q4_0 reaches its block's largest value on one side of zero, and a step less on the other.
LARGEST_ERRORS = {
    "f32": (0.0, 0.0),
    "f16": (2**-11, 2**-25),
    "bf16": (2**-8, 0.0),
    "q8_0": (1 / 254 + 2**-11, 2**-18),
    "q4_0": (1 / 8 + 2**-11, 2**-22),
}


@pytest.mark.parametrize("file_type", LARGEST_ERRORS)
def test_values_are_off_by_no_more_than_the_step_of_the_type(
    checkpoint, f32_file, tmp_path, file_type
):
    out = tmp_path / "model.gguf"
    assert run("to-gguf", checkpoint, out, "--type", file_type, "--no-verify") == 0
    rounded = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    for tensor in gguf.GGUFReader(f32_file).tensors:
        found = rounded[tensor.name]
        kind = found.tensor_type.name.lower()
        assert kind == meant_type(tensor, file_type), tensor.name
        block, _ = gguf.GGML_QUANT_SIZES[found.tensor_type]
        largest = np.abs(tensor.data).reshape(-1, block).max(-1, keepdims=True)
        off = np.abs(tensor.data - dequantized(found)).reshape(-1, block)
        share, least = LARGEST_ERRORS[kind]
        assert (off <= share * largest + least).all(), tensor.name


def meant_type(tensor, file_type):
    if tensor.data.ndim < 2:
        return "f32"
    if file_type in ("q8_0", "q4_0") and tensor.name.endswith("ffn_down.weight"):
        return "f16"
    return "q8_0" if (tensor.name, file_type) == ("output.weight", "q4_0") else file_type


def dequantized(tensor):
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def test_rows_that_are_no_whole_number_of_blocks_are_float16_and_it_is_said(
    checkpoint, tmp_path, capsys
):
    assert run("to-gguf", checkpoint, tmp_path / "m.gguf", "--type=q8_0", "--no-verify") == 0
    assert "3 tensors, such as blk.0.ffn_down.weight" in capsys.readouterr().err


# --- what others make of it ---


def test_transformers_computes_the_same_logits(written):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, params, out = written
    if model.qk_norm:
        pytest.skip("transformers 5.x reads no norms of query and key heads from GGUF files")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        out.parent, gguf_file=out.name, dtype=torch.float32, attn_implementation="eager"
    )
    ids = list(range(5, 45))
    with torch.no_grad():
        theirs = reference.eval()(torch.tensor([ids])).logits[0].numpy()
    ours = verify.our_logits(model, nest(params), ids)
    assert np.abs(ours).max() > 1  # there is something to compare
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_llama_cpp_makes_the_same_tokens_and_computes_the_same_logits(written, tokenizer_file):
    pytest.importorskip("cyllama")
    model, params, out = written
    llama = llama_cpp.LlamaCpp(out, 64)
    ids = load_tokenizer(tokenizer_file).encode(TEXT)
    assert llama.tokenize(TEXT) == ids
    ours = verify.our_logits(model, nest(params), ids)
    assert np.ptp(ours) > 1  # there is something to compare
    np.testing.assert_allclose(llama.logits([ids]), ours, rtol=0, atol=1e-4)


def test_texts_of_one_call_do_not_see_one_another(f32_file):
    pytest.importorskip("cyllama")
    llama = llama_cpp.LlamaCpp(f32_file, 64)
    texts = [[5, 9, 200, 31], [7], [9, 5, 31]]
    alone = np.concatenate([llama.logits([text]) for text in texts])
    np.testing.assert_allclose(llama.logits(texts), alone, rtol=0, atol=1e-5)
    assert np.abs(alone[0] - alone[4]).max() > 1e-2


def test_a_file_with_another_vocabulary_is_refused(f32_file):
    pytest.importorskip("cyllama")
    with pytest.raises(ValueError, match="other tokens of a text with model.gguf than arcade100k"):
        llama_cpp.LlamaCpp(f32_file, 16).check_tokens(load_tokenizer("arcade100k"))


# --- tokenizer ---


def test_the_vocabulary_is_that_of_the_checkpoint_padding_and_ends_included(checkpoint, f32_file):
    reader = gguf.GGUFReader(f32_file)
    field = {key.rpartition(".")[2]: found.contents() for key, found in reader.fields.items()}
    spec = json.loads((checkpoint / "tokenizer.json").read_text())
    tokens, types = field["tokens"], field["token_type"]
    assert len(tokens) == len(types) == MODEL.vocab_size == len(set(tokens))
    assert tokens[:257] == list(spec["model"]["vocab"])[:257]
    assert set(types[:257]) == {TokenType.NORMAL}
    assert tokens[257:260] == ["<|endoftext|>", "<|im_end|>", "[PAD259]"]
    assert types[257:259] == [TokenType.CONTROL] * 2
    assert set(types[259:]) == {TokenType.UNUSED}
    assert (field["model"], field["pre"], field["merges"]) == ("gpt2", "gpt-2", ["t h"])
    assert (field["bos_token_id"], field["padding_token_id"]) == (257, 257)
    assert field["eos_token_id"] == 258 and field["add_bos_token"] is False
    assert field["chat_template"] == "{{ messages }}"


def test_tokenizers_by_arcade100ks_rules_are_stablelm2_to_llama_cpp():
    content = train(["the other path of the others"] * 3, 300).to_str().encode()
    found = vocabulary(content, 384)
    assert found.pre == "stablelm2" and found.types[0] == TokenType.CONTROL
    assert [len(pair.split(" ")) for pair in found.merges] == [2] * len(found.merges)


def other_split():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|")), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer, why",
    [
        (Tokenizer(models.WordLevel({"a": 0}, "a")), "type = 'WordLevel'"),
        (Tokenizer(models.BPE(byte_fallback=True)), "byte_fallback = True"),
        (Tokenizer(models.BPE()), r"no split into words like that of this tokenizer \(None\)"),
        (other_split(), r"no split into words like that of this tokenizer \(Split, ByteLevel\)"),
    ],
)
def test_what_llama_cpp_cannot_split_or_join_alike_is_refused(tokenizer, why):
    with pytest.raises(ValueError, match=why):
        vocabulary(tokenizer.to_str().encode(), 384)


def test_the_end_of_a_document_is_special_whatever_the_file_says(tokenizer_file):
    spec = json.loads(tokenizer_file.read_bytes())
    for token in spec["added_tokens"]:
        token["special"] = False
    types = vocabulary(json.dumps(spec).encode(), 384).types
    assert types[257:259] == [TokenType.CONTROL, TokenType.USER_DEFINED]


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tokenizer_file):
    with pytest.raises(ValueError, match="ids up to 258, but the model only 256 rows"):
        vocabulary(tokenizer_file.read_bytes(), 256)


@pytest.mark.by_hand
def test_llama_cpp_makes_arcade100ks_tokens_of_real_text(tmp_path):
    pytest.importorskip("cyllama")
    arcade = load_tokenizer("arcade100k")
    model = dataclasses.replace(KINDS["1.6b"], vocab_size=arcade.vocab_size, num_layers=1)
    content = tokenizer_files.tokenizer_json(arcade)
    (tmp_path / "tokenizer.json").write_bytes(content)
    source = write_checkpoint(
        tmp_path / "global_step1", model, random_params(model), tmp_path / "tokenizer.json"
    )
    out = tmp_path / "model.gguf"
    assert run("to-gguf", source, out, "--type", "q8_0") == 0
    llama = llama_cpp.LlamaCpp(out, 64)
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[::4]:
        text = without_specials(path.read_text(encoding="utf-8"))
        assert llama.tokenize(text) == arcade.encode(text), path
    for distribution in importlib.metadata.distributions():
        text = without_specials(distribution.read_text("METADATA") or "")
        assert llama.tokenize(text) == arcade.encode(text), distribution.name
    assert llama.tokenize(LANGUAGES) == arcade.encode(LANGUAGES)


LANGUAGES = (
    "Größenwahn überfällt 1234 Äpfel; L'été dernier, où étiez-vous ? ¡Qué año! Não há coração que "
    "aguente. È già così, perché no? 日本語 中文 한국어 русский ελληνικά عربي ﬁ ½ Ⅷ ①②③ \u00a0no "
    "break\u2003em 🙂👩‍👩‍👧  \t\n\n \r\n end 'LL 'Re I'M they'd"
)


def without_specials(text):
    """In the form that training has it in, which llama.cpp does not make."""
    for special in SPECIAL_TOKENS:
        text = text.replace(special, "")
    return unicodedata.normalize("NFC", text)


# --- the verb ---


def test_a_file_is_checked_before_it_is_there(checkpoint, tmp_path, capsys):
    pytest.importorskip("cyllama")
    out = tmp_path / "model.gguf"
    assert run("to-gguf", checkpoint, out, "--type", "q8_0") == 0
    said = capsys.readouterr()
    assert f"checked by {llama_cpp.name()}: largest" in said.err.replace("\n", " ")
    assert f"llama-cli -m {out}" in said.out
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("file_type", ["f32", "q4_0"])
def test_a_file_with_a_wrong_value_is_not_kept(
    checkpoint, tmp_path, monkeypatch, capsys, file_type
):
    write = gguf_export._rounded

    def with_one_wrong(stored, values, importance):
        if stored.name == "blk.1.attn_k.weight":
            values[3, 7] -= np.abs(values).max()
        return write(stored, values, importance)

    monkeypatch.setattr(gguf_export, "_rounded", with_one_wrong)
    assert run("to-gguf", checkpoint, tmp_path / "model.gguf", "--type", file_type) == 1
    assert "blk.1.attn_k.weight was not written as it should be" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_with_a_wrong_hyperparameter_is_not_kept(checkpoint, tmp_path, monkeypatch, capsys):
    change_rope(monkeypatch)
    assert run("to-gguf", checkpoint, tmp_path / "model.gguf", "--type", "f16") == 1
    assert "stablelm.rope.freq_base was not written as" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_not_kept(checkpoint, tmp_path, monkeypatch, capsys):
    pytest.importorskip("cyllama")
    change_rope(monkeypatch)
    monkeypatch.setattr(gguf_export, "check_file", lambda *_: None)  # llama.cpp alone is asked
    assert run("to-gguf", checkpoint, tmp_path / "model.gguf", "--type", "f16") == 1
    assert "What was written is wrong and was removed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def change_rope(monkeypatch):
    add = gguf.GGUFWriter.add_key_value

    def add_another_base(writer, key, value, *kind):
        add(writer, key, value / 100 if key == "stablelm.rope.freq_base" else value, *kind)

    monkeypatch.setattr(gguf.GGUFWriter, "add_key_value", add_another_base)


def test_without_llama_cpp_every_value_is_read_back_and_it_is_said_what_was_not_done(
    checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "cyllama.llama", None)
    assert run("to-gguf", checkpoint, tmp_path / "model.gguf", "--type", "q8_0") == 0
    said = capsys.readouterr().err.replace("\n", " ")
    assert "gguf, which read every value back" in said and llama_cpp.INSTALL in said


def test_a_file_that_llama_cpp_does_not_load_is_refused_with_its_reason(tmp_path, f32_file):
    pytest.importorskip("cyllama")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(f32_file.read_bytes()[:-1000])
    with pytest.raises(llama_cpp.LoadError, match="does not load cut.gguf"):
        llama_cpp.LlamaCpp(cut, 16)


def test_a_file_that_is_there_is_kept_unless_forced(checkpoint, tmp_path, capsys):
    out = tmp_path / "model.gguf"
    out.write_text("mine")
    assert run("to-gguf", checkpoint, out, "--no-verify") == 1
    assert out.read_text() == "mine" and "--force" in capsys.readouterr().err
    assert run("to-gguf", checkpoint, out, "--no-verify", "--force") == 0
    assert out.read_bytes()[:4] == b"GGUF"
