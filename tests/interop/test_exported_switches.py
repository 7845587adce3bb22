"""Which of the model's switches go to other software, and what is said of those that cannot."""

import dataclasses

import numpy as np
import pytest
from small_models import KINDS, random_params, read_checkpoint, write_checkpoint

from stablelm_jax import convert

TIED = dataclasses.replace(KINDS["3b"], tie_embeddings=True)
RMS = dataclasses.replace(KINDS["3b"], norm="rms")


def export(verb, model, folder, tokenizer_file, *more):
    checkpoint = write_checkpoint(
        folder / "global_step1", model, random_params(model), tokenizer_file
    )
    return convert.main([verb, str(checkpoint), str(folder / "out.gguf"), *more])


def test_transformers_computes_what_a_tied_export_holds_and_it_comes_back(
    tmp_path, tokenizer_file, capsys
):
    pytest.importorskip("transformers")
    assert export("to-hf", TIED, tmp_path, tokenizer_file, "--dtype", "float32") == 0
    assert "transformers" in capsys.readouterr().err  # what checked it
    back = [str(tmp_path / name) for name in ("out.gguf", "global_step2")]
    assert convert.main(["from-hf", *back, "--no-verify"]) == 0
    found, written = read_checkpoint(tmp_path / "global_step2"), random_params(TIED)
    assert found.keys() == written.keys() and "head/kernel" not in found
    for name, values in written.items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize(
    ("verb", "model", "why"),
    [
        ("to-hf", RMS, "transformers's StableLM cannot hold model.norm=rms"),
        ("to-gguf", RMS, "llama.cpp's StableLM cannot hold model.norm=rms"),
        ("to-gguf", TIED, "llama.cpp's StableLM cannot hold model.tie_embeddings=True"),
    ],
)
def test_an_export_that_the_other_software_cannot_compute_is_refused(
    tmp_path, tokenizer_file, capsys, verb, model, why
):
    assert export(verb, model, tmp_path, tokenizer_file) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert why in line and "trained with the field's default" in line
    assert not (tmp_path / "out.gguf").exists()
