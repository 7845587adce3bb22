"""Types of a GGUF file: which tensor gets which, and what llama.cpp's rounding is held to."""

import ctypes
import dataclasses
import importlib.util
import sys

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from small_models import KINDS, random_params, write_checkpoint

from stablelm_jax import convert
from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.interop import gguf_export, gguf_types, llama_cpp
from stablelm_jax.interop.gguf_types import BLOCKS, explains, rounded
from stablelm_jax.model.config import ModelConfig

PUBLISHED = ModelConfig(100352, 24, 2048, 32, 32, 5632)  # the 1.6B
WIDE = dataclasses.replace(KINDS["1.6b"], width=256, feed_forward_width=96, num_layers=8)
LLAMA_CPP = pytest.mark.skipif(
    not importlib.util.find_spec("xllamacpp"), reason="rounds by llama.cpp: the extra edge"
)
_OFTEN = ("q2_k", "q3_k_m", "iq4_xs", "q5_k_m")
BY_LLAMA_CPP = [name for name in gguf_types.FILE_TYPES if gguf_types.needs_llama_cpp(name)]


# --- which tensor gets which type ---


def types_of(model, file_type, part, weighted=False):
    """The types of one matrix over the layers, as letters: 6 for Q6_K."""
    stored = gguf_export.stored_tensors(model, file_type, weighted)
    names = [s.quantization.name for s in stored if s.name.endswith(f"{part}.weight")]
    return "".join(name.removeprefix("I")[1] for name in names)


@pytest.mark.parametrize(
    "file_type, value, down, out, head",
    [
        # As llama_model_quantize of llama.cpp 0.5.0 says of this shape, asked for a dry run.
        ("q2_k", "3" * 24, "3" * 24, "3" * 24, "6"),
        ("q3_k_s", "3" * 24, "3" * 24, "3" * 24, "6"),
        ("q3_k_m", "55" + "4" * 22, "5" + "4" * 23, "4" * 24, "6"),
        ("q3_k_l", "5" * 24, "5" * 24, "5" * 24, "6"),
        ("iq4_xs", "4" * 24, "555" + "4" * 21, "4" * 24, "6"),
        ("q4_k_s", "5555" + "4" * 20, "555" + "4" * 21, "4" * 24, "6"),
        ("q4_k_m", "666446446446446446446666", "666446446446446446446666", "4" * 24, "6"),
        ("q5_k_s", "5" * 24, "5" * 24, "5" * 24, "6"),
        ("q5_k_m", "666556556556556556556666", "666556556556556556556666", "5" * 24, "6"),
        ("q6_k", "6" * 24, "6" * 24, "6" * 24, "6"),
    ],
)
def test_what_harms_most_is_finer_as_in_llama_cpps_own_files(file_type, value, down, out, head):
    assert types_of(PUBLISHED, file_type, "attn_v") == value
    assert types_of(PUBLISHED, file_type, "ffn_down") == down
    assert types_of(PUBLISHED, file_type, "attn_output") == out
    plain = file_type.removeprefix("i")[1]
    assert types_of(PUBLISHED, file_type, "attn_q") == plain * 24
    assert types_of(PUBLISHED, file_type, "token_embd") == plain
    stored = gguf_export.stored_tensors(PUBLISHED, file_type)
    assert [s.quantization.name for s in stored if s.name == "output.weight"] == [f"Q{head}_K"]


@pytest.mark.parametrize(
    "file_type, billions", [("q8_0", 1.75), ("q4_k_m", 1.03), ("q5_k_m", 1.19)]
)
def test_files_are_as_large_as_those_published_of_the_same_model(file_type, billions):
    stored = gguf_export.stored_tensors(PUBLISHED, file_type)
    assert sum(one.num_bytes for one in stored) == pytest.approx(billions * 1e9, rel=0.01)


def test_shared_keys_and_an_importance_matrix_change_the_choice():
    shared = dataclasses.replace(PUBLISHED, num_kv_heads=8)
    assert types_of(shared, "q2_k", "attn_v") == "4" * 24
    assert types_of(shared, "iq4_xs", "attn_v") == "5" * 24
    assert types_of(PUBLISHED, "iq4_xs", "ffn_down", weighted=True) == "4" * 24


@pytest.mark.parametrize(
    "columns, found",
    [(256, "q4_k q5_k q6_k iq4_xs"), (96, "q5_0 q5_1 q8_0 iq4_nl"), (80, "f16 f16 f16 f16")],
)
def test_rows_that_suit_no_block_of_256_have_one_of_32_or_are_float16(columns, found):
    wished = (Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_XS)
    names = [gguf_types.fitting_type(type_, columns).name.lower() for type_ in wished]
    assert " ".join(names) == found


# --- rounding, and its check ---


def weights(seed=5, rows=8):
    """Rows that differ in size, with a few large values, as trained matrices have."""
    print("seed", seed)
    rng = np.random.default_rng(seed)
    values = rng.standard_t(4, (rows, 512)) * rng.uniform(0.01, 0.2, (rows, 1))
    return values.astype(np.float32), rng.lognormal(size=512).astype(np.float32)


def of_llama_cpp(type_):
    return pytest.param(type_, marks=LLAMA_CPP) if type_ != Type.Q8_0 else type_


BLOCK_TYPES = pytest.mark.parametrize("type_", [of_llama_cpp(type_) for type_ in BLOCKS])


@BLOCK_TYPES
def test_what_was_rounded_is_taken_with_importance_and_without(type_):
    values, importance = weights()
    data = rounded(values, type_)
    assert explains(type_, data, values)
    if type_ != Type.Q8_0:
        weighted = rounded(values, type_, importance)
        assert explains(type_, weighted, values, importance)
        assert not np.array_equal(weighted, data)


@BLOCK_TYPES
@pytest.mark.parametrize("damage", ["code", "rows", "scale", "block"])
def test_a_damaged_file_is_refused(type_, damage):
    values, _ = weights()
    data = rounded(values, type_)
    blocks = data.reshape(-1, gguf.GGML_QUANT_SIZES[type_][1])
    codes = np.zeros(blocks.shape[1], bool)
    codes[BLOCKS[type_].codes] = True
    if damage == "code":  # a byte in the middle, the highest bit of each code in it
        blocks[3, np.flatnonzero(codes)[len(blocks[0]) // 4]] ^= 0x88
    elif damage == "rows":
        data[[2, 5]] = data[[5, 2]]
    elif damage == "scale":
        blocks[4, ~codes] = 0
    else:
        blocks[6] = blocks[7]
    assert not explains(type_, data, values)


@LLAMA_CPP
@pytest.mark.parametrize("with_importance", [False, True])
def test_q4_k_is_within_half_a_step_of_its_parts_own_scale_and_minimum(with_importance):
    """Read by the layout that ggml-common.h gives, without `gguf`."""
    values, importance = weights(rows=64)
    data = rounded(values, Type.Q4_K, importance if with_importance else None)
    blocks = data.reshape(-1, 144)
    scale, minimum = blocks[:, :4].copy().view(np.float16).astype(np.float64).T
    b = blocks[:, 4:16].astype(int)
    steps = np.concatenate([b[:, :4] & 63, (b[:, 8:] & 15) | (b[:, :4] >> 6) << 4], 1)
    lows = np.concatenate([b[:, 4:8] & 63, (b[:, 8:] >> 4) | (b[:, 4:8] >> 6) << 4], 1)
    step, low = (scale[:, None] * steps)[..., None], -(minimum[:, None] * lows)[..., None]
    packed = blocks[:, 16:].reshape(-1, 4, 1, 32)
    codes = np.concatenate([packed & 15, packed >> 4], 2).reshape(-1, 8, 32)
    meant = values.reshape(-1, 8, 32).astype(np.float64)
    reached = np.clip(meant, low, low + 15 * step)
    assert (np.abs(reached - (low + step * codes)) <= step / 2 * (1 + 1e-5)).all()
    assert np.mean(reached != meant) < 0.2  # few are cut off
    read = gguf.quants.dequantize(data, Type.Q4_K)
    np.testing.assert_allclose(read.reshape(-1, 8, 32), low + step * codes, rtol=0, atol=1e-6)


@LLAMA_CPP
@pytest.mark.parametrize("type_", [Type.Q2_K, Type.Q6_K, Type.IQ4_XS])
def test_importance_makes_the_weighted_error_smaller(type_):
    values, importance = weights(rows=64)

    def error(data):
        return (importance * np.square(gguf.quants.dequantize(data, type_) - values)).sum()

    assert error(rounded(values, type_, importance)) < 0.97 * error(rounded(values, type_))


@LLAMA_CPP
def test_the_bytes_are_llama_cpps_whatever_the_threads(monkeypatch):
    values, importance = weights(rows=37)
    expected = np.empty((37, 2 * 210), np.uint8)
    pointers = (values.ctypes.data, expected.ctypes.data, 0, 37, 512, importance.ctypes.data)
    gguf_types.llama_cpp_function()(Type.Q6_K, *pointers)
    for threads in (1, 3):
        monkeypatch.setattr(gguf_types, "num_processors", lambda: threads)  # noqa: B023
        np.testing.assert_array_equal(rounded(values, Type.Q6_K, importance), expected)


def test_values_that_are_not_finite_are_refused():
    values, _ = weights()
    values[1, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        rounded(values, Type.Q8_0)


# --- the verb ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_file):
    folder = tmp_path_factory.mktemp("wide")
    return write_checkpoint(folder / "global_step7", WIDE, random_params(WIDE), tokenizer_file)


@pytest.fixture(scope="module")
def f32_file(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("f32") / "f32.gguf"
    gguf_export.write_file(SavedModel.open(checkpoint), out, "f32")
    return out


def run(*arguments):
    return convert.main([str(argument) for argument in arguments])


@LLAMA_CPP
@pytest.mark.parametrize(
    "file_type",
    [x if x == "q4_k_m" else pytest.param(x, marks=pytest.mark.by_hand) for x in BY_LLAMA_CPP],
)
def test_a_file_of_llama_cpps_rounding_is_checked_and_computed(
    checkpoint, tmp_path, capsys, file_type
):
    assert run("to-gguf", checkpoint, tmp_path / "m.gguf", "--type", file_type) == 0
    said = capsys.readouterr().err.replace("\n", " ")
    assert f"checked by {llama_cpp.name()}: largest" in said
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    code = gguf.LlamaFileType[f"MOSTLY_{file_type.upper()}"]
    assert reader.get_field("general.file_type").contents() == code
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@LLAMA_CPP
@pytest.mark.parity
@pytest.mark.parametrize(
    "file_type",
    [x if x in _OFTEN else pytest.param(x, marks=pytest.mark.by_hand) for x in BY_LLAMA_CPP],
)
def test_every_byte_is_that_of_llama_cpps_own_quantiser(checkpoint, f32_file, tmp_path, file_type):
    """On 8 layers with rows of 256 and of 96, which fall back."""
    library = pytest.importorskip("cyllama.llama.llama_cpp")
    library.disable_logging()
    params = library.LlamaModelQuantizeParams()
    params.ftype = gguf.LlamaFileType[f"MOSTLY_{file_type.upper()}"].value
    params.nthread = 1
    library.model_quantize(str(f32_file), str(tmp_path / "theirs.gguf"), params)
    gguf_export.write_file(SavedModel.open(checkpoint), tmp_path / "ours.gguf", file_type)
    ours, theirs = (
        {
            tensor.name: (tensor.tensor_type, tensor.data.tobytes())
            for tensor in gguf.GGUFReader(tmp_path / name).tensors
        }
        for name in ("ours.gguf", "theirs.gguf")
    )
    different = [name for name in ours if ours[name] != theirs.pop(name)]
    assert not different and not theirs


@LLAMA_CPP
def test_it_is_said_which_tensors_fall_back_and_to_what(checkpoint, tmp_path, capsys):
    assert run("to-gguf", checkpoint, tmp_path / "m.gguf", "--type=q4_k_m", "--no-verify") == 0
    said = capsys.readouterr().err
    assert "4 tensors, such as blk.0.ffn_down.weight, have rows of 96 values, no whole" in said
    assert "number of q6_k blocks: stored as q8_0" in said
    assert "number of q4_k blocks: stored as q5_0" in said


def test_without_llama_cpp_the_package_is_named_before_anything_is_written(
    checkpoint, tmp_path, monkeypatch, capsys
):
    gguf_types.llama_cpp_function.cache_clear()
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    monkeypatch.setitem(sys.modules, "xllamacpp.xllamacpp", None)
    assert run("to-gguf", checkpoint, tmp_path / "m.gguf", "--type", "q4_k_m") == 1
    assert "`pip install 'stablelm_jax[edge]'`" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@LLAMA_CPP
def test_a_library_without_the_function_is_an_error_that_says_so(monkeypatch):
    gguf_types.llama_cpp_function.cache_clear()
    python = ctypes.CDLL(None)
    monkeypatch.setattr(gguf_types.ctypes, "CDLL", lambda path: python)
    with pytest.raises(ValueError, match="choose q8_0 or q4_0"):
        gguf_types.llama_cpp_function()


def test_the_verb_offers_every_type():
    assert convert.GGUF_TYPES == gguf_types.FILE_TYPES
