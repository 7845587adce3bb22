import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chats import MODEL, Document, as_float64, packed, padded, plain_nll, random_params
from chats import random_pairs as make_pairs
from seeds import new_rng

from stablelm_jax.kernels import cross_entropy as cross_entropy_module
from stablelm_jax.model.compute import Compute
from stablelm_jax.model.parameters import parameter_table
from stablelm_jax.parallel import sharding
from stablelm_jax.parallel.mesh import make_mesh
from stablelm_jax.training.gradient import make_gradient_function
from stablelm_jax.training.objectives import (
    PairObjective,
    TokenObjective,
    mean_loss,
    means,
    sum_names,
)

SOURCES = ("a", "b")
FLOAT32 = Compute(attention="reference")
SFT_ALONE, DPO_SIGMOID = TokenObjective(2, "sft"), PairObjective(2, 0.1)
# data, model, mode, microbatches, cross-entropy: each way a gradient is computed
WAYS = {
    "one device": (1, 1, "whole", 1, "reference"),
    "microbatches, tiled": (1, 1, "whole", 4, "tiled"),
    "eight devices": (8, 1, "zero1", 1, "tiled"),
    "four by two": (4, 2, "zero1", 2, "saved"),
    "two by four, FSDP": (2, 4, "fsdp", 2, "saved"),
}
LOSSES = {
    "sigmoid": {},
    "ipo": {"kind": "ipo", "beta": 0.3},
    "smoothed": {"label_smoothing": 0.2},
    "normalised": {"length_normalised": True, "beta": 2.0},
    "with sft": {"sft_weight": 0.7},
}
# Each way with one loss, where trl does not compute that loss beside ours in test_trl_parity.py;
# all combinations by hand.
CHOSEN = dict(zip(("sigmoid", "smoothed", "ipo", "normalised", "with sft"), WAYS)) | {"ipo": None}
DPO = [
    pytest.param(loss, way, marks=[] if CHOSEN[loss] == way else pytest.mark.by_hand)
    for loss in LOSSES
    for way in WAYS
]

SFT = [pytest.param(way, marks=[] if way == "four by two" else pytest.mark.by_hand) for way in WAYS]


def gradient_of(objective, way, params, batch):
    """Gradients and sums by source, as a run computes them."""
    data, model, mode, accumulation, cross_entropy = WAYS[way]
    mesh = make_mesh(data, model, jax.devices()[: data * model])
    specs = sharding.master_specs(parameter_table(MODEL), mesh, mode != "whole")
    remat = "full" if mode == "fsdp" else "none"
    gradient = make_gradient_function(
        MODEL,
        mesh,
        objective=objective,
        accumulation=accumulation,
        zero1=mode != "whole",
        fsdp=mode == "fsdp",
        compute=Compute(attention="reference", cross_entropy=cross_entropy, remat=remat),
    )
    placed = jax.device_put(params, sharding.named(mesh, specs)) if mode == "fsdp" else params
    found, sums = jax.jit(gradient)(placed, sharding.put_batch(batch, mesh))
    return jax.device_get(found), {name: np.float64(x) for name, x in sums.items()}


def assert_gradients_close(found, expected):
    def close(f, e):
        assert np.abs(f - e).max() <= 2e-5 * np.abs(e).max()

    jax.tree.map(close, found, jax.tree.map(np.asarray, expected))


@pytest.fixture(scope="module", autouse=True)
def several_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy_module, "ROWS", 100)
        yield


@pytest.fixture(scope="module")
def preferences():
    """Parameters, pairs, their batch with a reference, and float64's logps with their vjp."""
    rng = new_rng()
    params, (pairs, batch) = random_params(rng), make_pairs(rng)
    with jax.enable_x64(True):
        ids, targets, trained = padded([side for pair in pairs for side in pair])

        def logps(params):
            return -(plain_nll(params, ids, targets) * trained).sum(1).reshape(-1, 2)

        logps_P2, backward = jax.vjp(logps, as_float64(params))
        reference_P2 = np.float32(logps_P2 + rng.normal(0, 4, logps_P2.shape))
    batch["reference"] = np.where(
        (batch["pair_ids"] >= 0)[..., None], reference_P2[batch["pair_ids"]], np.float32(0)
    )
    tokens_P2 = trained.sum(1).reshape(-1, 2)
    source_P = np.array([chosen.row % 2 for chosen, _ in pairs])
    return params, pairs, batch, (logps_P2, backward, np.float64(reference_P2), tokens_P2, source_P)


def plain_dpo(
    logps_P2, reference_P2, tokens_P2, beta, kind, label_smoothing, length_normalised, sft_weight
):
    """The loss as the papers write it."""
    ratio = logps_P2 - reference_P2
    if length_normalised or kind == "ipo":
        ratio = ratio / tokens_P2
    delta = ratio[:, 0] - ratio[:, 1]
    if kind == "ipo":
        losses = (delta - 1 / (2 * beta)) ** 2
    else:
        right, wrong = 1 / (1 + jnp.exp(-beta * delta)), 1 / (1 + jnp.exp(beta * delta))
        losses = -(1 - label_smoothing) * jnp.log(right) - label_smoothing * jnp.log(wrong)
    chosen = -logps_P2[:, 0].sum() / tokens_P2[:, 0].sum()
    return losses.mean() + sft_weight * chosen, beta * ratio


@pytest.mark.parametrize("loss, way", DPO)
def test_dpo_is_that_of_float64_in_loss_and_gradient_on_any_mesh(preferences, loss, way):
    params, _, batch, (logps_P2, backward, reference_P2, tokens_P2, source_P) = preferences
    objective = PairObjective(2, **{"beta": 0.1, **LOSSES[loss]})
    options = {
        name: getattr(objective, name)
        for name in ("beta", "kind", "label_smoothing", "length_normalised", "sft_weight")
    }
    with jax.enable_x64(True):
        (expected, rewards_P2), weights_P2 = jax.value_and_grad(plain_dpo, has_aux=True)(
            logps_P2, reference_P2, tokens_P2, **options
        )
        (gradients,) = backward(weights_P2)
        expected, rewards_P2 = float(expected), np.asarray(rewards_P2)
    found, sums = gradient_of(objective, way, params, batch)
    assert_gradients_close(found, gradients)
    metrics = means(objective, SOURCES, sums)
    assert metrics["loss"] == pytest.approx(expected, rel=2e-5)
    assert float(mean_loss(objective, sums)) == pytest.approx(expected, rel=2e-5)
    by_pair = {"rewards": rewards_P2, "logps": np.asarray(logps_P2), "answer_tokens": tokens_P2}
    for suffix, of in (("", source_P >= 0), ("/a", source_P == 0), ("/b", source_P == 1)):
        for what, values_P2 in by_pair.items():
            for side, values_P in zip(("chosen", "rejected"), values_P2[of].T):
                key = f"{what}/{side}{suffix}"
                assert metrics[key] == pytest.approx(values_P.mean(), rel=2e-5, abs=1e-5)
        margins_P = rewards_P2[of, 0] - rewards_P2[of, 1]
        margin, accuracy = margins_P.mean(), (margins_P > 0).mean()
        assert metrics[f"rewards/margin{suffix}"] == pytest.approx(margin, rel=2e-5, abs=1e-5)
        assert metrics[f"rewards/accuracy{suffix}"] == pytest.approx(accuracy)


def conversations(rng):
    """A row for each length of an answer, beside a second document with an answer of one token."""

    def document(answer):
        ids = rng.integers(0, MODEL.vocab_size, 5 + answer).astype(np.int32)
        return Document(ids, np.arange(1, len(ids)) >= 5)

    rows = [[document(answer), document(1)] for answer in (1, 18, 3, 9, 2, 19, 1, 5)]
    return rows, packed(rows, np.arange(len(rows)) % 2)


@pytest.mark.parametrize("way", SFT)
def test_sft_is_the_mean_over_the_trained_tokens_of_the_whole_step(way):
    rng = new_rng()
    params, (rows, batch) = random_params(rng), conversations(rng)
    with jax.enable_x64(True):
        ids, targets, trained = padded([document for row in rows for document in row])

        def loss(params):
            return (plain_nll(params, ids, targets) * trained).sum() / trained.sum()

        expected, gradients = jax.value_and_grad(loss)(as_float64(params))
        expected = float(expected)
    counts = batch["loss_mask"].sum(1)
    assert counts.max() > 4 * counts.min()  # a mean of the rows' means would be another number
    objective = TokenObjective(2, "sft")
    found, sums = gradient_of(objective, way, params, batch)
    assert_gradients_close(found, gradients)
    assert means(objective, SOURCES, sums)["loss"] == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("objective", [SFT_ALONE, DPO_SIGMOID])
def test_a_batch_with_nothing_to_train_has_a_loss_and_a_gradient_of_zero(preferences, objective):
    params, _, batch, _ = preferences
    empty = batch | {name: 0 * batch[name] for name in ("loss_mask", "reference")}
    empty["pair_ids"] = np.full_like(batch["pair_ids"], -1)
    found, sums = gradient_of(objective, "one device", params, empty)
    assert float(mean_loss(objective, sums)) == 0.0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(found))
    assert means(objective, SOURCES, sums) == {"loss": None}


@pytest.fixture(scope="module")
def measured():
    """f(objective, params, batch) -> the loss, and what is measured of each token or answer."""

    @functools.partial(jax.jit, static_argnums=0)
    def measure(objective, params, batch):
        sums, parts = objective.measure(MODEL, params, batch, compute=FLOAT32)
        return mean_loss(objective, sums), parts

    return measure


def test_a_changed_neighbour_in_a_row_changes_nothing_else_bit_for_bit(preferences, measured):
    params, pairs, batch, _ = preferences
    first = next(pair for pair in pairs if (batch["pair_ids"][pair[0].row] >= 0).all())[0]
    changed = {name: np.array(values) for name, values in batch.items()}
    place = changed["segment_ids"][first.row] == first.segment
    changed["tokens"][first.row, place] = (changed["tokens"][first.row, place] + 1) % 96
    for objective, what in ((DPO_SIGMOID, "logps"), (SFT_ALONE, "nll")):
        everywhere = {"loss_mask": np.ones_like(batch["loss_mask"])} if what == "nll" else {}
        before, after = (
            measured(objective, params, values | everywhere)[1][what] for values in (batch, changed)
        )
        differs = np.asarray(before) != np.asarray(after)
        if what == "logps":
            assert differs[first.row, (first.segment - 1) // 2, 0] and differs.sum() == 1
        else:
            assert differs[first.row, place].all()
            differs[first.row, place] = False
            assert not differs.any()


def test_what_is_often_done_wrong_is_told_apart(measured):
    rng = np.random.default_rng(0)  # by chance a mistake may change next to nothing
    params, (_, batch) = random_params(rng), make_pairs(rng)
    batch["reference"] = rng.normal(-40, 4, (*batch["pair_ids"].shape, 2)).astype(np.float32)
    mask = batch["loss_mask"]
    ends = (mask > 0) & (np.diff(batch["segment_ids"], append=0) != 0)
    wrong = {
        "mask one late": {"loss_mask": np.pad(mask, ((0, 0), (1, 0)))[:, :-1]},
        "end not counted": {"loss_mask": mask * ~ends},
    }
    of_sft = wrong | {"no segments": {"segment_ids": np.ones_like(batch["segment_ids"])}}
    of_dpo = wrong | {"sides exchanged": {"reference": batch["reference"][..., ::-1]}}
    for objective, variants in ((SFT_ALONE, of_sft), (DPO_SIGMOID, of_dpo)):
        right = float(measured(objective, params, batch)[0])
        for what, change in variants.items():
            loss = float(measured(objective, params, batch | change)[0])
            assert abs(loss - right) > 1e-3 * right, what
        positions = {"positions": np.arange(mask.shape[1], dtype=np.int32) + 0 * batch["positions"]}
        loss = float(measured(objective, params, batch | positions)[0])
        assert loss == pytest.approx(right, rel=2e-5)  # no mistake: rotary is relative


def test_the_sums_of_an_objective_are_what_its_metrics_are_made_of():
    assert sum_names(TokenObjective(2)) == ["nll", "tokens"]  # as older checkpoints have them
    assert "sft" in sum_names(PairObjective(2, 0.1, sft_weight=1.0))
    assert set(PairObjective(2, 0.1).metrics) == {
        *("loss", "rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy"),
        *("logps/chosen", "logps/rejected", "answer_tokens/chosen", "answer_tokens/rejected"),
    }


def test_an_infinite_margin_costs_nothing_where_no_preference_is_doubted():
    margins = jnp.array([np.inf, 0.0])
    np.testing.assert_allclose(DPO_SIGMOID._of_margin(margins), [0.0, np.log(2)], rtol=1e-6)
