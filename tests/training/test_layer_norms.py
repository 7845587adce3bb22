"""Norms by layer: against NumPy, on two meshes, and beside a training that they leave as it is."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import random_params
from tiny import bare_config, losses, train

from stablelm_jax.model.loss import batch_loss
from stablelm_jax.model.parameters import nest
from stablelm_jax.parallel import sharding
from stablelm_jax.training import metrics
from stablelm_jax.training.programs import compile_layer_norms
from stablelm_jax.training.setup import prepare_run
from stablelm_jax.training.state import state_of_weights

SPLIT = {"parallel.data": 4, "parallel.model": 2, "parallel.fsdp": True}
SPLIT |= {"training.accumulation": 2, "training.remat": "attention"}


def layer_norm(x, group, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * group["scale"]
    return x + group.get("bias", 0)


def turned(x_BTNH, positions_BT, size, theta):
    half = size // 2
    angles = positions_BT[..., None, None] * theta ** (-np.arange(half) / half)
    a, b = x_BTNH[..., :half], x_BTNH[..., half:size]
    pair = a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)
    return np.concatenate([*pair, x_BTNH[..., size:]], -1)


def layer_of(layers, i):
    return jax.tree.map(lambda x: x[i], layers)


def stream_sizes(model, weights, batch):
    """The root mean square of the residual stream after each layer, in float64 of NumPy."""
    segments, positions = batch["segment_ids"], batch["positions"]
    seen = (segments[:, :, None] == segments[:, None]) & np.tri(segments.shape[1], dtype=bool)
    x, sizes = np.float64(weights["embed"]["embedding"])[batch["tokens"]], []
    for i in range(model.num_layers):
        layer = jax.tree.map(np.float64, layer_of(weights["layers"], i))
        attention, mlp = layer["attention"], layer["mlp"]
        normed = layer_norm(x, layer["attention_norm"], model.norm_epsilon)
        q, k, v = (
            np.einsum("btd,dnh->btnh", normed, part["kernel"]) + part.get("bias", 0)
            for part in (attention["query"], attention["key"], attention["value"])
        )
        q, k = (turned(x, positions, model.rotary_size, model.rotary_theta) for x in (q, k))
        scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(model.head_size)
        scores = np.exp(np.where(seen[:, None], scores, -np.inf))
        mixed = np.einsum("bnts,bsnh->btnh", scores / scores.sum(-1, keepdims=True), v)
        x = x + np.einsum("btnh,nhd->btd", mixed, attention["out"]["kernel"])
        normed = layer_norm(x, layer["mlp_norm"], model.norm_epsilon)
        gate = normed @ mlp["gate"]["kernel"]
        x = (
            x
            + (gate / (1 + np.exp(-gate)) * (normed @ mlp["up"]["kernel"])) @ mlp["down"]["kernel"]
        )
        sizes.append(np.sqrt(np.mean(x**2)))
    return sizes


def norm(tree):
    return np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(tree)))


@pytest.mark.parametrize("mesh", [{}, SPLIT], ids=["data=8", "data=4,model=2,fsdp,accumulation"])
def test_the_norms_are_those_of_numpy_on_any_mesh(data, mesh):
    run = prepare_run(bare_config(data, **mesh, **{"data.batch_size": 16}))
    weights, batch = nest(random_params(run.model)), next(run.batches(0))
    placed = jax.device_put(weights, jax.tree.map(lambda x: x.sharding, run.abstract.params))
    state = state_of_weights(run.optimizer, run.abstract, placed)
    found = compile_layer_norms(run)(state, sharding.put_batch(batch, run.mesh))
    line = {key: float(value) for key, value in found.items()}

    def loss(params):
        scale = 1 / jnp.sum(batch["loss_mask"])
        return batch_loss(run.model, params, batch, scale, compute=run.compute)[0]

    gradients = jax.jit(jax.grad(loss))(weights)
    layers = gradients.pop("layers")
    expected = {f"grad_norm/{group}": norm(part) for group, part in gradients.items()}
    for i, size in enumerate(stream_sizes(run.model, weights, batch)):
        expected[f"grad_norm/layer{i}"] = norm(layer_of(layers, i))
        expected[f"activation_norm/layer{i}"] = size
    assert line == pytest.approx(expected, rel=2e-5)


@pytest.mark.by_hand
def test_norms_by_layer_are_lines_of_their_own_and_leave_the_training_as_it_is(data, tmp_path):
    free = {"optimizer.kind": "schedule_free_adamw"}  # its gradient is not taken at the weights
    _, undisturbed = train(bare_config(data, **free), tmp_path / "undisturbed")
    config = bare_config(data, **free, **{"training.layer_norms_every": 5})
    _, lines = train(config, tmp_path / "run")
    assert losses(lines) == losses(undisturbed)
    looks = [line for line in lines if "activation_norm/layer1" in line]
    assert [line["step"] for line in looks] == [5, 10, 12]
    whole = {line["step"]: line["grad_norm"] for line in lines if "loss" in line}
    for line in looks:
        squares = [value**2 for key, value in line.items() if key.startswith("grad_norm/")]
        assert sum(squares) ** 0.5 == pytest.approx(whole[line["step"]], rel=1e-5)
    assert lines[-1]["seconds/evaluation"] > 0


def test_memory_is_that_of_the_fullest_device_and_absent_where_none_tells(monkeypatch):
    assert metrics._memory() == {}
    told = [{"bytes_in_use": n * 2**30, "peak_bytes_in_use": 3 * 2**30} for n in (1, 2)]
    devices = [SimpleNamespace(memory_stats=lambda stats=stats: stats) for stats in told]
    monkeypatch.setattr(metrics.jax, "local_devices", lambda: devices)
    assert metrics._memory() == {"memory/in_use_gib": 2.0, "memory/peak_gib": 3.0}
