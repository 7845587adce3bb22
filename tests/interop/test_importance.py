"""Importance matrices: against torch hooks, in llama.cpp's format, from held-out text."""

import dataclasses

import gguf
import numpy as np
import pytest
from prepared import write_source
from small_models import KINDS, random_params, write_checkpoint
from transformers_models import their_model

from stablelm_jax import convert
from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.data.manifest import TokenizerInfo
from stablelm_jax.interop import importance
from stablelm_jax.interop.tensor_map import tensor_values, tensors
from stablelm_jax.model.parameters import nest
from stablelm_jax.tokenizer.tokenizer import load_tokenizer

LENGTH = 24


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_squares_of_inputs_are_those_that_transformers_multiplies_with(kind):
    torch = pytest.importorskip("torch")
    model, params = KINDS[kind], random_params(KINDS[kind], seed=3)
    theirs = their_model(model).eval()
    values = zip(tensors(model), tensor_values(tensors(model), iter(params.items())))
    # Without norm biases of our own theirs are zeros.
    state = {one.name: torch.tensor(np.array(value)) for one, value in values}
    theirs.load_state_dict(state, strict=True)
    print("seed", 3)
    tokens = np.random.default_rng(3).integers(0, model.vocab_size, (1, LENGTH)).astype(np.int32)
    counted = (np.arange(LENGTH) % 5 > 0).astype(np.float32)[None]
    found = {}

    def note(name):
        def hook(module, inputs):
            x_TI = inputs[0].detach().numpy().reshape(LENGTH, -1).astype(np.float64)
            found[name] = (np.square(x_TI) * counted.T).sum(0)

        return hook

    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(note(f"{name}.weight"))
    with torch.no_grad():
        theirs(torch.tensor(tokens, dtype=torch.long))
    positions = np.arange(LENGTH, dtype=np.int32)[None]
    sums = importance._sums(model, nest(params), tokens, tokens * 0 + 1, positions, counted)
    matrices = [one.tensor for one in importance._matrices(model)]
    assert len(matrices) == len(found) == 7 * model.num_layers
    for tensor in matrices:
        ours = np.asarray(sums[tensor.ours][tensor.index])
        assert np.ptp(ours) > 0.1
        np.testing.assert_allclose(ours, found[tensor.name], rtol=1e-4, err_msg=tensor.name)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_file):
    model = dataclasses.replace(KINDS["1.6b"], width=256, feed_forward_width=256, num_layers=2)
    folder = tmp_path_factory.mktemp("importance")
    return write_checkpoint(folder / "global_step1", model, random_params(model), tokenizer_file)


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer_file):
    """Two sources, one of a row and a half of held-out tokens, one of three rows."""
    tokenizer, root = load_tokenizer(tokenizer_file), tmp_path_factory.mktemp("data")
    info = TokenizerInfo("bytes", tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod)
    rng = np.random.default_rng(2)
    for name, count in (("one", 95), ("two", 190)):
        held_out = [[*rng.integers(0, 200, count).tolist(), tokenizer.eod]]
        write_source(root, name, [held_out], held_out, info)
    return root


def test_each_held_out_token_counts_once_and_sources_have_the_same_share(checkpoint, data):
    own = SavedModel.open(checkpoint)  # its rows have 64 tokens
    params, rows = nest(dict(own.leaves())), []
    found = importance.of_data(own, params, data, 4, rows.append)
    assert sum(rows) == 4  # two of each source
    sums, count = 0.0, 0
    for name, tokens in (("one", 95), ("two", 128)):
        path = next((data / name).glob("*held_out*.bin"))
        ids = np.fromfile(path, np.int32)
        for start in range(0, tokens, 64):
            row = ids[start : min(start + 64, tokens)][None]
            shape = np.ones(row.shape, np.int32)
            places = np.arange(row.size, dtype=np.int32)[None]
            one = importance._sums(own.model, params, row, shape, places, shape * 1.0)
            sums, count = sums + one["layers/mlp/down/kernel"][1], count + row.size
    assert count == 95 + 128
    np.testing.assert_allclose(found["blk.1.ffn_down.weight"], sums / count, rtol=1e-5)


def run(*arguments):
    return convert.main([str(argument) for argument in arguments])


def test_a_file_written_with_importance_says_so_and_its_matrix_serves_again(
    checkpoint, data, tmp_path, capsys
):
    pytest.importorskip("xllamacpp")
    plain, weighted, again = (tmp_path / f"{name}.gguf" for name in ("plain", "first", "again"))
    kept, shared = tmp_path / "kept.gguf", ("to-gguf", checkpoint)
    assert run(*shared, plain, "--type=q3_k_s", "--no-verify") == 0
    more = ("--imatrix", data, "--imatrix-rows=3", "--save-imatrix", kept)
    assert run(*shared, weighted, "--type=q3_k_s", *more) == 0
    assert run(*shared, again, "--type=q3_k_s", "--no-verify", "--imatrix", kept) == 0
    assert weighted.read_bytes() == again.read_bytes() != plain.read_bytes()
    field = gguf.GGUFReader(weighted).get_field("quantize.imatrix.entries_count")
    assert field.contents() == 14
    # As llama.cpp's own program stores it: [1, inputs] and [1, 1], the type imatrix.
    found = {tensor.name: tensor.shape.tolist() for tensor in gguf.GGUFReader(kept).tensors}
    assert found["blk.1.ffn_up.weight.in_sum2"] == [256, 1] and len(found) == 28
    assert found["blk.1.ffn_up.weight.counts"] == [1, 1]
    with pytest.raises(ValueError, match="no 64 sums of squares for blk.0.attn_q.weight"):
        importance.read_file(kept, KINDS["1.6b"])


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf])
def test_sums_that_no_text_has_are_refused(tmp_path, value):
    model = KINDS["1.6b"]
    matrices = importance._matrices(model)
    wrong = {m.name: np.full(m.tensor.shape[-1], value, np.float32) for m in matrices}
    importance.write_file(tmp_path / "wrong.gguf", wrong, "none")
    with pytest.raises(ValueError, match="no 64 sums of squares for blk.0.attn_q.weight"):
        importance.read_file(tmp_path / "wrong.gguf", model)


@pytest.mark.parametrize(
    "given, why",
    [
        (["--type=q8_0", "--imatrix=."], "q8_0 takes no importance matrix"),
        (["--type=q4_k_m", "--save-imatrix=FILE"], "only with --imatrix DATA"),
        (["--type=q4_k_m", "--imatrix=FILE", "--imatrix-rows=3"], "only with --imatrix DATA"),
        (["--type=q4_k_m", "--imatrix=EMPTY", "--save-imatrix=EMPTY"], "is a folder"),
        (["--type=q4_k_m", "--imatrix=EMPTY"], "neither a folder of prepared sources nor"),
        (["--type=q4_k_m", "--imatrix=FILE"], "is no imatrix file of llama.cpp's"),
    ],
)
def test_what_is_no_importance_matrix_is_refused(checkpoint, tmp_path, capsys, given, why):
    pytest.importorskip("xllamacpp")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("not GGUF")
    names = {"EMPTY": str(tmp_path / "empty"), "FILE": str(tmp_path / "file")}
    for name, path in names.items():
        given = [argument.replace(name, path) for argument in given]
    assert run("to-gguf", checkpoint, tmp_path / "m.gguf", *given) == 1
    assert why in capsys.readouterr().err
    assert not (tmp_path / "m.gguf").exists()
