"""The contracts of a run, for each optimizer: exact resume, any mesh, what a checkpoint holds."""

import jax
import numpy as np
import pytest
from tiny import bare_config, losses, tiny_config, train

from stablelm_jax import config as config_lib
from stablelm_jax.checkpoint.reading import read_run
from stablelm_jax.config.tree import OPTIMIZERS
from stablelm_jax.model.parameters import flatten
from stablelm_jax.parallel import sharding
from stablelm_jax.parallel.mesh import make_mesh
from stablelm_jax.training.programs import lower_step
from stablelm_jax.training.setup import optimizer_and_state
from stablelm_jax.training.state import init_state

OTHERS = OPTIMIZERS[1:]  # AdamW is what all other tests run
# Rates that suit the tiny run; Lion's steps have the size of its rate.
RATES = {"lion": 3e-3}


def config_of(data, kind, make=bare_config, **overrides):
    if kind == "ademamix":
        overrides = {"optimizer.ademamix_warmup_steps": 12, **overrides}
    own = {"optimizer.kind": kind, "schedule.peak": RATES.get(kind, 1e-2)}
    return make(data, **own, **overrides)


def of_step(workdir, step):
    return read_run(workdir / f"checkpoints/global_step{step}")


@pytest.fixture(
    scope="module",
    params=[
        "muon",
        pytest.param("lion", marks=pytest.mark.by_hand),
        pytest.param("ademamix", marks=pytest.mark.by_hand),
        "schedule_free_adamw",
    ],
)
def undisturbed(request, data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp(request.param)
    return request.param, workdir, *train(config_of(data, request.param), workdir)


def test_a_run_learns_and_one_stopped_at_a_checkpoint_goes_on_bit_for_bit(
    data, undisturbed, tmp_path
):
    kind, workdir, code, lines = undisturbed
    assert code == 0 and losses(lines)[12] < losses(lines)[1] - 0.05
    train(config_of(data, kind, **{"training.num_steps": 8}), tmp_path)
    assert train(config_of(data, kind), tmp_path)[0] == 0
    assert losses(train(config_of(data, kind), tmp_path)[1]) == losses(lines)
    assert of_step(tmp_path, 12)["checksums"] == of_step(workdir, 12)["checksums"]


def test_a_checkpoint_holds_the_state_under_the_parameters_names_and_sums_it(undisturbed):
    kind, workdir, _, _ = undisturbed
    first, last = of_step(workdir, 4)["checksums"], of_step(workdir, 12)["checksums"]
    trees = {
        "muon": {"m"},
        "lion": {"m"},
        "ademamix": {"m", "m_slow", "v"},
        "schedule_free_adamw": {"z", "v"},
    }[kind]
    names = {name.removeprefix("params/") for name in last if name.startswith("params/")}
    for tree in trees:
        assert {f"optimizer/{tree}/{name}" for name in names} <= set(last)
    changed = [name for name in last if "/v/" in name or "/m/" in name or "/z/" in name]
    assert all(last[name] != first[name] for name in changed)
    assert "optimizer/count" in last and "optimizer/updates_skipped" in last
    by_adam = {name for name in last if name.startswith("optimizer/v/")}
    if kind == "muon":
        assert by_adam and not {name for name in by_adam if "layers" in name and "kernel" in name}


def test_another_optimizer_takes_the_weights_but_never_the_state(data, undisturbed, tmp_path):
    kind, workdir, _, _ = undisturbed
    told = f"config.optimizer.kind was '{kind}', now 'adamw'"
    with pytest.raises(ValueError, match=f"belongs to another run: {told}"):
        train(config_of(data, "adamw", **{"training.num_steps": 14}), workdir)
    parent = {"branch.parent": str(workdir / "checkpoints/global_step8")}
    with pytest.raises(ValueError, match=f"{told}.*--config.branch.state=weights"):
        train(config_of(data, "adamw", **parent), tmp_path / "all")
    weights = parent | {"branch.state": "weights", "training.num_steps": 3}
    code, lines = train(config_of(data, "adamw", **weights), tmp_path / "weights")
    assert code == 0 and losses(lines)[1] < losses(undisturbed[3])[1] - 0.02
    of = lambda run: {k: v for k, v in run["checksums"].items() if k.startswith("params/")}  # noqa: E731
    assert of(of_step(tmp_path / "weights", 0)) == of(of_step(workdir, 8))


def test_held_out_loss_of_a_schedule_free_run_is_that_of_the_weights_in_its_checkpoint(
    data, tmp_path
):
    kind, quiet = "schedule_free_adamw", {"samples.every": 0, "training.num_steps": 6}
    _, lines = train(config_of(data, kind, tiny_config, **quiet), tmp_path / "run")
    own = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    parent = {"branch.parent": str(tmp_path / "run"), "branch.state": "weights"}
    branch = config_of(data, "adamw", tiny_config, **quiet, **parent)
    _, lines = train(branch, tmp_path / "branch")
    assert next(line["eval/loss"] for line in lines if "eval/loss" in line) == own[6]


MESHES = {
    "8x1": {"parallel.data": 8},
    "4x2": {"parallel.data": 4, "parallel.model": 2},
    "2x4": {"parallel.data": 2, "parallel.model": 4},
    "4x2 fsdp": {
        **{"parallel.data": 4, "parallel.model": 2},
        **{"parallel.fsdp": True, "training.remat": "full"},
    },
    "2x2x2 whole": {
        **{"parallel.replica": 2, "parallel.data": 2, "parallel.model": 2},
        "parallel.zero1": False,
    },
}
EVERY_TIME = ("muon", "4x2 fsdp")


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        pytest.param(kind, mesh, marks=() if (kind, mesh) == EVERY_TIME else pytest.mark.by_hand)
        for kind in OTHERS
        for mesh in MESHES
    ],
)
def test_eight_devices_give_the_losses_of_one(data, kind, mesh):
    alone, together = (steps_of(config_of(data, kind, **over)) for over in ({}, MESHES[mesh]))
    np.testing.assert_allclose(together, alone, rtol=0, atol=2e-5)


_known: dict[str, list[float]] = {}


def steps_of(config):
    """The losses of four steps on random tokens, on as many devices as the config names."""
    parallel = config.parallel
    shape = [parallel.data if parallel.data > 0 else 1, parallel.model]
    key = repr(sorted(config_lib.flatten(config)))
    if key in _known:
        return _known[key]
    count = shape[0] * shape[1] * parallel.replica
    mesh = make_mesh(*shape, jax.devices()[:count], replica=parallel.replica)
    optimizer, abstract = optimizer_and_state(config, mesh)
    step = lower_step(config, mesh, 2).compile()
    state = init_state(config_lib.model_config(config), optimizer, abstract, seed=1)
    rng, found = np.random.default_rng(1), []
    for _ in range(4):
        tokens = rng.integers(0, 100, (8, 33)).astype(np.int32)
        batch = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segment_ids": np.ones((8, 32), np.int32),
            "positions": np.tile(np.arange(32, dtype=np.int32), (8, 1)),
            "loss_mask": np.ones((8, 32), np.float32),
            "source_ids": np.zeros(8, np.int32),
        }
        state, metrics = step(state, sharding.put_batch(batch, mesh))
        found.append(float(metrics["nll"][0] / metrics["tokens"][0]))
    _known[key] = found
    return found


@pytest.mark.parametrize("kind", OTHERS)
def test_state_is_split_over_data_as_the_weights_are_and_adapters_have_one_too(data, kind):
    mesh = make_mesh(4, 2)
    for overrides in ({}, {"lora.rank": 4, "branch.parent": "x", "branch.state": "weights"}):
        _, state = optimizer_and_state(config_of(data, kind, **overrides), mesh)
        places = {name: leaf.sharding for name, leaf in flatten(state.params).items()}
        for part, tree in state.opt_state.items():
            for name, leaf in flatten(tree).items() if isinstance(tree, dict) else ():
                assert leaf.sharding == places[name], (part, name)
    assert {name.split("/")[-1] for name in places} == {"lora_a", "lora_b"}
