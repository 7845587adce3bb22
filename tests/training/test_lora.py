"""Adapters of low rank: what is trained, what stays, and what a run of them leaves behind."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chats import MODEL, as_float64, packed, padded, plain_nll, random_document, random_params
from seeds import new_rng
from small_models import random_params as flat_params
from small_models import read_checkpoint, write_checkpoint
from tiny import CHOICES, TALKS, bare_config, losses, metrics, tiny_config, train, write_chats

from stablelm_jax import config as config_lib
from stablelm_jax.checkpoint.reading import CheckpointError, read_run, state_hash
from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.config import ConfigError
from stablelm_jax.model.compute import Compute
from stablelm_jax.model.lora import Adapted, Lora
from stablelm_jax.model.parameters import flatten, nest
from stablelm_jax.parallel import sharding
from stablelm_jax.parallel.mesh import make_mesh
from stablelm_jax.training.gradient import make_gradient_function
from stablelm_jax.training.objectives import TokenObjective
from stablelm_jax.training.setup import optimizer_and_state
from stablelm_jax.training.state import abstract_frozen

LORA = Lora(rank=3, alpha=8.0, targets=("query", "value", "out", "gate", "down"))
# data, model, FSDP, microbatches, remat
WAYS = {
    "one device": (1, 1, False, 1, "none"),
    "four by two": (4, 2, False, 2, "full"),
    "two by four, FSDP": (2, 4, True, 2, "dots"),
}


def random_adapters(rng, lora=LORA, model=MODEL):
    """B is not zero."""
    return nest({r.name: np.float32(rng.normal(0, 0.1, r.shape)) for r in lora.table(model)})


def added(params, adapters, lora=LORA):
    """W + alpha / rank A B, written down once more."""
    flat, found = flatten(params), {}
    for name, value in flatten(adapters).items():
        found.setdefault(name.rpartition("/")[0], {})[name[-1]] = value
    for name, pair in found.items():
        a, b = pair["a"], pair["b"]
        product = jnp.stack([jnp.tensordot(a[n], b[n], 1) for n in range(len(a))])
        flat[f"{name}/kernel"] = flat[f"{name}/kernel"] + lora.alpha / lora.rank * product
    return nest(flat)


@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=[] if "FSDP" in w else pytest.mark.by_hand) for w in WAYS]
)
def test_gradients_of_adapters_are_those_of_the_merged_weights_in_float64(way):
    rng = new_rng()
    params, adapters = random_params(rng), random_adapters(rng)
    documents = [random_document(rng) for _ in range(8)]
    batch = packed([[document] for document in documents], np.arange(8) % 2)
    data, model, fsdp, accumulation, remat = WAYS[way]
    mesh = make_mesh(data, model, jax.devices()[: data * model])
    gradient = make_gradient_function(
        MODEL,
        mesh,
        objective=TokenObjective(2),
        accumulation=accumulation,
        zero1=True,
        compute=Compute(attention="reference", remat=remat),
        fsdp=fsdp,
        lora=LORA,
    )
    like = abstract_frozen(MODEL, mesh, jnp.float32, fsdp)
    frozen = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, like)
    found, _ = jax.jit(gradient)(adapters, sharding.put_batch(batch, mesh), frozen)
    with jax.enable_x64(True):
        ids, targets, trained = padded(documents)

        def loss(adapters):
            nll = plain_nll(added(as_float64(params), adapters), ids, targets)
            return (nll * trained).sum() / trained.sum()

        expected = jax.device_get(jax.grad(loss)(as_float64(adapters)))
    assert flatten(found).keys() == flatten(expected).keys()
    for name, value in flatten(expected).items():
        np.testing.assert_allclose(
            flatten(found)[name], value, rtol=0, atol=5e-5 * np.abs(value).max(), err_msg=name
        )


def test_the_state_of_a_lora_run_has_moments_of_adapters_alone(data):
    config = bare_config(data, **{"lora.rank": 4, "parallel.data": 4, "parallel.model": 2})
    optimizer, state = optimizer_and_state(config, make_mesh(4, 2))
    count = sum(x.size for x in jax.tree.leaves(state.params))
    # rank x (inputs + outputs) of four matrices of 64 x 64 and three of 64 x 64 in each of 2 layers
    assert count == 2 * 7 * 4 * (64 + 64)
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * count + 1
    split = {sharding.data_dim(x.sharding.spec) for x in jax.tree.leaves(state.params)}
    assert None not in split  # ZeRO-1
    moved = state.opt_state["m"]["layers"]["mlp"]["up"]["lora_a"].sharding
    assert moved == state.params["layers"]["mlp"]["up"]["lora_a"].sharding
    assert all(sharding.data_dim(x.sharding.spec) is None for x in jax.tree.leaves(state.frozen))
    assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"float32"}


@pytest.fixture(scope="module")
def parent(data, tmp_path_factory):
    """Random weights, as `convert from-hf` writes them."""
    path = tmp_path_factory.mktemp("parent") / "global_step0"
    model = config_lib.model_config(bare_config(data))
    params = flat_params(model, int(new_rng().integers(2**32)))
    return write_checkpoint(path, model, params, data / "tokenizer.json")


def lora_config(data, parent, sources=(), **overrides):
    values = {
        "branch.parent": str(parent),
        "branch.state": "weights",
        "lora.rank": 4,
        "training.num_steps": 4,
        "checkpoint.every": 2,
        "samples.every": 0,
    }
    return tiny_config(data, sources, **{**values, **overrides})


@pytest.fixture(scope="module")
def whole(data, parent, tmp_path_factory):
    """The folder of a LoRA run to its end."""
    workdir = tmp_path_factory.mktemp("lora")
    assert train(lora_config(data, parent), workdir)[0] == 0
    return workdir


def checkpoint(workdir, step=4):
    return workdir / f"checkpoints/global_step{step}"


def test_a_checkpoint_holds_adapters_alone_and_names_the_weights_under_them(parent, whole):
    run = read_run(checkpoint(whole))
    names = {key.rpartition("/")[2] for key in run["checksums"] if key.startswith("params/")}
    assert names == {"lora_a", "lora_b"}
    assert run["lora"] == {
        "rank": 4,
        "alpha": 16.0,
        "targets": ["query", "key", "value", "out", "gate", "up", "down"],
        "parent": str(parent),
        "parent_hash": state_hash(read_run(parent)["checksums"]),
    }


def test_at_first_nothing_is_added_and_later_only_to_the_targets(data, parent, whole, tmp_path):
    base = read_checkpoint(parent)
    for name, value in read_checkpoint(checkpoint(whole, 0)).items():
        np.testing.assert_array_equal(value, base[name], err_msg=name)
    moved = {n for n, v in read_checkpoint(checkpoint(whole)).items() if (v != base[n]).any()}
    matrices = {f"layers/attention/{name}/kernel" for name in ("query", "key", "value", "out")}
    assert moved == matrices | {f"layers/mlp/{name}/kernel" for name in ("gate", "up", "down")}


def test_what_a_run_computes_is_what_its_merged_checkpoint_computes(data, whole):
    """The last held-out loss of the run is that of a full model, loaded as every verb loads it."""
    from stablelm_jax.training.held_out import evaluate_held_out
    from stablelm_jax.training.setup import prepare_run

    run = prepare_run(bare_config(data))
    params = SavedModel.open(whole).load(run.mesh)
    found = evaluate_held_out(run.eval_step, params, run.held_out(), run.mesh, run.objective)
    assert found["eval/loss"] == pytest.approx(metrics(whole)[-1]["eval/loss"], rel=1e-6)


def test_a_lora_run_learns_and_goes_on_bit_for_bit(data, parent, whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(checkpoint(workdir))
    train(lora_config(data, parent), workdir)
    now, before = (read_run(checkpoint(path))["checksums"] for path in (workdir, whole))
    assert now == before and losses(metrics(workdir)) == losses(metrics(whole))
    assert losses(metrics(whole))[4] < losses(metrics(whole))[1]


def chat_config(objective, chats, parent, **overrides):
    """Three steps of SFT or DPO from a model of the same sizes and tokenizer."""
    values = {
        "training.objective": objective,
        "data.packing": "best_fit",
        "training.num_steps": 3,
        "evaluation.every": 0,
    }
    source = CHOICES if objective == "dpo" else TALKS
    return lora_config(chats, parent, sources={source: 1.0}, **{**values, **overrides})


@pytest.mark.by_hand
def test_dpo_compares_with_the_model_under_the_adapters(parent, tmp_path):
    chats, workdir = write_chats(tmp_path / "chats"), tmp_path / "run"
    _, lines = train(chat_config("dpo", chats, parent), workdir)
    assert losses(lines)[1] == pytest.approx(np.log(2), rel=1e-4) != losses(lines)[3]
    before = np.load(workdir / "reference/tables.npz")
    shutil.rmtree(workdir / "reference")  # computed again, of the parent whatever was learnt
    train(chat_config("dpo", chats, parent, **{"training.num_steps": 4}), workdir)
    after = np.load(workdir / "reference/tables.npz")
    assert all(np.array_equal(before[name], after[name]) for name in before.files)


@pytest.mark.by_hand
def test_sft_with_adapters_learns_and_samples_from_what_they_make(parent, tmp_path):
    chats = write_chats(tmp_path / "chats")
    more = {"training.num_steps": 8, "samples.every": 8, "evaluation.every": 8}
    _, lines = train(chat_config("sft", chats, parent, **more), tmp_path / "run")
    assert losses(lines)[8] < losses(lines)[1]
    assert (tmp_path / "run/samples/global_step8.txt").exists()
    assert SavedModel.open(tmp_path / "run").chat.name == "tiny"


def test_a_parent_that_moved_is_named_anew_or_linked_and_another_one_refused(
    data, parent, whole, tmp_path
):
    copy = shutil.copytree(parent, tmp_path / "there/global_step0")
    workdir = tmp_path / "run"
    train(lora_config(data, copy, **{"training.num_steps": 3}), workdir)
    moved = (tmp_path / "moved").mkdir() or copy.rename(tmp_path / "moved/global_step0")
    gone = "holds adapters alone.*not to be found.*Put that checkpoint back, or a link"
    with pytest.raises(CheckpointError, match=gone):
        train(lora_config(data, copy), workdir)
    with pytest.raises(CheckpointError, match=gone):
        read_checkpoint(checkpoint(workdir, 3))
    shutil.copytree(checkpoint(whole), copy.parent / "global_step0")
    with pytest.raises(CheckpointError, match="holds other weights|holds step"):
        train(lora_config(data, copy), workdir)
    (workdir / "parent").symlink_to(moved)
    assert len(read_checkpoint(checkpoint(workdir, 3)))
    (workdir / "parent").unlink()
    train(lora_config(data, moved), workdir)
    assert read_run(checkpoint(workdir))["lora"]["parent"] == str(moved)
    assert read_run(checkpoint(workdir))["checksums"] == read_run(checkpoint(whole))["checksums"]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ({"lora.rank": 65}, "config.lora.rank=65: is more than the 64 columns"),
        ({"lora.targets": ("query", "head")}, "'head' is no matrix of a layer; use some of query"),
        ({"lora.targets": ()}, "names no matrix"),
        (
            {"lora.rank": 0, "lora.alpha": 2.0},
            "config.lora.alpha=2.0: does nothing without config.lora.rank",
        ),
    ],
)
def test_adapters_that_cannot_be_are_refused(data, override, told):
    with pytest.raises(ConfigError, match=told):
        config_lib.validate(bare_config(data, **{"lora.rank": 4, **override}))


def test_adapters_need_a_model_whose_moments_are_left_behind(data, whole, tmp_path):
    for config, told in (
        (
            lora_config(data, "", **{"branch.state": "all"}),
            "LoRA does, which adds to it; set it to",
        ),
        (bare_config(data, **{"branch.parent": str(whole)}), "trained adapters, this one does not"),
    ):
        with pytest.raises(ConfigError, match=told):
            train(config, tmp_path / "new")
    with pytest.raises(ValueError, match="config.lora.rank was 4, now 8"):
        train(lora_config(data, "", **{"lora.rank": 8, "branch.state": "all"}), whole)


@pytest.mark.by_hand
@pytest.mark.parametrize("more", [{}, {"lora.rank": 2, "lora.targets": ("up",)}])
def test_a_lora_checkpoint_is_a_parent_like_others(data, whole, tmp_path, more):
    config = lora_config(data, whole, **{"lora.rank": 0, "samples.every": 0, **more})
    train(config, tmp_path)
    merged = read_checkpoint(checkpoint(whole))
    for name, value in read_checkpoint(checkpoint(tmp_path, 0)).items():
        np.testing.assert_array_equal(value, merged[name], err_msg=name)


@pytest.mark.by_hand
def test_a_branch_of_all_of_a_lora_run_goes_on_as_it_would_have(data, parent, whole, tmp_path):
    config = lora_config(data, checkpoint(whole, 2), **{"branch.state": "all"})
    train(config, tmp_path)
    ours, theirs = (read_run(checkpoint(path)) for path in (tmp_path, whole))
    assert ours["checksums"] == theirs["checksums"] and ours["lora"] == theirs["lora"]


MESHES = {
    "2x4": {"parallel.data": 2, "parallel.model": 4},
    "8x1, FSDP": {"parallel.data": 8, "parallel.fsdp": True, "training.remat": "full"},
    "4x2, accumulation": {"parallel.data": 4, "parallel.model": 2, "training.accumulation": 2},
}


@pytest.mark.by_hand
@pytest.mark.parametrize("mesh", MESHES)
def test_the_mesh_changes_nothing_but_rounding(data, parent, whole, tmp_path, mesh):
    _, lines = train(lora_config(data, parent, **MESHES[mesh]), tmp_path)
    for step, loss in losses(lines).items():
        assert loss == pytest.approx(losses(metrics(whole))[step], rel=1e-4)


def test_in_bfloat16_the_smallest_adapters_change_what_is_computed_as_in_float32():
    """W + A B in bfloat16 is W where A B is below half a step of W: there nothing would change."""
    rng = new_rng()
    kernel = np.float32(jnp.asarray(rng.normal(0, 0.05, (64, 8, 32)), jnp.bfloat16))
    a, b = rng.normal(0, 0.1, (64, 4)), rng.normal(0, 1e-5, (4, 8, 32))
    x, g = rng.normal(0, 1, (4096, 64)), rng.normal(0, 1, (4096, 256))
    x, g = (np.float32(jnp.asarray(value, jnp.bfloat16)) for value in (x, g))
    low = lambda value: jnp.asarray(value, jnp.bfloat16)  # noqa: E731
    adapters = jnp.float32(a), jnp.float32(b)

    def changes(x, kernel, g):
        """Of the product and of its gradient by x, where A B is added."""
        product = lambda x, b: Adapted(kernel, adapters[0], b, 2.0).times(x)  # noqa: E731
        found = []
        for b in (adapters[1], jnp.zeros_like(adapters[1])):
            y, backward = jax.vjp(lambda x, b=b: product(x, b), x)
            found.append([np.float64(y), np.float64(backward(g)[0])])
        return [with_b - without for with_b, without in zip(*found)]

    delta = 2.0 * a @ b.reshape(4, -1)
    for change, due in zip(changes(low(x), low(kernel), low(g)), (x @ delta, g @ delta.T)):
        # Each number is rounded by far more than it changes; all together show the change.
        assert (change * due).sum() / (due * due).sum() == pytest.approx(1, abs=0.05)
