"""Continued pretraining of an import begins where transformers' StableLM stands."""

import contextlib
import shutil

import numpy as np
import pytest
from seeds import new_rng
from tiny import bare_config, train
from transformers_models import their_model

from stablelm_jax import config as config_lib
from stablelm_jax import convert
from stablelm_jax.checkpoint.reading import read_run
from stablelm_jax.training.setup import prepare_run

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def theirs(data, tmp_path_factory):
    """(model, folder): random weights, with biases and norms that are not at their beginning."""
    config = config_lib.model_config(bare_config(data))
    torch.manual_seed(int(new_rng().integers(2**31)))
    model = their_model(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    shutil.copy(data / "tokenizer.json", folder)
    return model, folder


def loss_of_transformers(model, batch):
    """Mean over the counted targets of a batch, documents apart from one another."""
    tokens, targets, segments, positions = (
        torch.tensor(np.asarray(batch[name]), dtype=torch.long)
        for name in ("tokens", "targets", "segment_ids", "positions")
    )
    seen = torch.tril(segments[:, :, None] == segments[:, None, :])
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask[:, None], position_ids=positions).logits
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    )
    weights = torch.tensor(np.asarray(batch["loss_mask"])).flatten()
    return float((nll * weights).sum() / weights.sum())


def test_the_first_loss_is_that_of_transformers_on_the_same_rows(data, theirs, tmp_path):
    model, folder = theirs
    imported = tmp_path / "imported"
    assert convert.main(["from-hf", str(folder), str(imported), "--no-verify"]) == 0
    values = {"branch.parent": str(imported), "model.block_norm_bias": True}
    config = bare_config(data, **values, **{"training.num_steps": 3})
    _, lines = train(config, tmp_path / "run")
    with contextlib.closing(prepare_run(config).batches(0)) as batches:
        expected = loss_of_transformers(model, next(batches))
    assert expected > 4.5  # random weights: about ln 128, and more
    # Sums of float32 in another order: logits differ by 1e-5 at most, the mean of 256 by less.
    assert lines[0]["loss"] == pytest.approx(expected, rel=2e-6)
    origin = read_run(tmp_path / "run/checkpoints/global_step0")["origin"]
    assert origin["parent"].startswith(str(imported))
