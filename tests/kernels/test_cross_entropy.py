import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stablelm_jax.kernels import cross_entropy as module
from stablelm_jax.kernels.cross_entropy import IMPLEMENTATIONS, cross_entropy
from stablelm_jax.parallel.mesh import make_mesh
from stablelm_jax.planning.program import collectives
from stablelm_jax.planning.targets import parse_target

D, V = 16, 203
CHUNK = 8


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    monkeypatch.setattr(module, "ROWS", CHUNK)
    return request.param


def random_inputs(rows=33, scale=1.0, dtype=jnp.float32, valid=V):
    """x_BTD, kernel_DV, targets_BT, weights_BT; a third of the tokens are masked."""
    rng = np.random.default_rng([rows, valid])
    batch = 3 if rows % 3 == 0 else 1
    shape = (batch, rows // batch)
    weights_BT = rng.uniform(0.5, 2, shape) * (rng.random(shape) > 1 / 3)
    return (
        jnp.asarray(scale * rng.normal(size=(*shape, D)), dtype),
        jnp.asarray(scale * rng.normal(size=(D, V)), dtype),
        rng.integers(0, valid, shape, np.int32),
        jnp.asarray(weights_BT, jnp.float32),
    )


def in_float64(x_BTD, kernel_DV, targets_BT, weights_BT, valid=None):
    """The loss, the losses of the tokens, and the gradients of the loss, by the textbook."""
    x, kernel, weights = (np.asarray(a, np.float64) for a in (x_BTD, kernel_DV, weights_BT))
    ids = np.arange(kernel.shape[1])
    scores = np.where(ids < (valid or len(ids)), x @ kernel, -np.inf)
    shifted = scores - scores.max(-1, keepdims=True)
    probabilities = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    at_target = np.take_along_axis(shifted, targets_BT[..., None], -1)[..., 0]
    nll_BT = np.log(np.exp(shifted).sum(-1)) - at_target
    d_scores = (probabilities - (ids == targets_BT[..., None])) * weights[..., None]
    dkernel_DV = np.einsum("btd,btv->dv", x, d_scores)
    return np.sum(weights * nll_BT), nll_BT, d_scores @ kernel.T, dkernel_DV


def with_gradients(inputs, **options):
    """As `in_float64`; the gradients of 3 times the loss, over 3: a cotangent that is not 1."""
    x, kernel, targets, weights = inputs

    def tripled(x, kernel):
        loss, nll = cross_entropy(x, kernel, targets, weights, **options)
        return 3 * loss, nll

    (loss, nll), grads = jax.jit(jax.value_and_grad(tripled, (0, 1), has_aux=True))(x, kernel)
    return loss / 3, nll, *(np.asarray(g, np.float64) / 3 for g in grads)


def assert_close(found, expected, tolerance=1e-5):
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f, e, rtol=tolerance, atol=tolerance * np.abs(e).max())


@pytest.mark.parametrize("rows", [1, CHUNK - 1, CHUNK, CHUNK + 1, 33])
def test_loss_and_gradients_are_those_of_float64(implementation, rows):
    inputs = random_inputs(rows)
    assert_close(with_gradients(inputs, implementation=implementation), in_float64(*inputs))


def test_rows_without_weight_have_a_loss_and_no_gradient(implementation):
    x, kernel, targets, weights = random_inputs()
    inputs = (x, kernel, targets, jnp.zeros_like(weights))
    loss, nll, dx, dkernel = with_gradients(inputs, implementation=implementation)
    assert loss == 0 and not dx.any() and not dkernel.any()
    assert_close([nll], [in_float64(*inputs)[1]])


@pytest.mark.parametrize("valid", [1, 190, V])
def test_padding_of_the_vocabulary_gets_no_probability_and_no_gradient(implementation, valid):
    inputs = random_inputs(valid=valid)
    found = with_gradients(inputs, implementation=implementation, num_valid=valid)
    assert_close(found, in_float64(*inputs, valid))
    assert not found[3][:, valid:].any()


@pytest.mark.parametrize("target, valid", [(-1, V), (195, 190)])
def test_a_token_whose_target_has_no_probability_counts_for_nothing_where_it_is_masked(
    implementation, target, valid
):
    x, kernel, targets, weights = random_inputs(valid=valid)
    options = dict(implementation=implementation, num_valid=valid)
    masked = (x, kernel, targets, weights.at[0, 0].set(0.0))
    loss, nll, *gradients = with_gradients(masked, **options)
    targets[0, 0] = target
    for weight, expected in ((0.0, (loss, 0.0)), (0.25, (np.inf, np.inf))):
        odd = (x, kernel, targets, weights.at[0, 0].set(weight))
        found_loss, found_nll, *found = with_gradients(odd, **options)
        assert (found_loss, found_nll[0, 0]) == expected
        np.testing.assert_array_equal(found_nll[1:], nll[1:])
        for ours, without in zip(found, gradients):
            np.testing.assert_array_equal(ours, without)


def test_in_float16_a_sum_of_exponentials_above_its_largest_number_does_no_harm(implementation):
    vocab_size, rng = 80_000, np.random.default_rng(16)
    x = jnp.asarray(rng.normal(size=(1, 3, 4)), jnp.float16)
    kernel = jnp.asarray(rng.normal(size=(4, vocab_size)) / 64, jnp.float16)
    targets = rng.integers(0, vocab_size, (1, 3))
    inputs = (x, kernel, targets, jnp.asarray(rng.uniform(1, 2, (1, 3)), jnp.float32))
    exact = in_float64(*inputs)
    for found, expected in zip(with_gradients(inputs, implementation=implementation), exact):
        assert np.linalg.norm(found - expected) < 2e-3 * np.linalg.norm(expected)


def test_large_logits_stay_finite_and_exact(implementation):
    inputs = random_inputs(scale=100)
    found = with_gradients(inputs, implementation=implementation)
    assert_close(found[:2], in_float64(*inputs)[:2], 1e-6)
    assert all(np.isfinite(gradient).all() for gradient in found[2:])


def test_in_bfloat16_it_errs_less_than_plain_autodiff_of_a_bfloat16_head(implementation):
    inputs = random_inputs(99, dtype=jnp.bfloat16)
    exact = in_float64(*inputs)

    @jax.grad
    def plain(both):
        logits_BTV = jnp.matmul(*both).astype(jnp.float32)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, inputs[2])
        return jnp.sum(3 * nll * inputs[3])

    def error(found, expected):
        return np.linalg.norm(np.asarray(found, np.float64) - expected)

    _, nll, *ours = with_gradients(inputs, implementation=implementation)
    assert error(nll, exact[1]) < 1e-5 * np.linalg.norm(exact[1])  # float32 logits
    for found, theirs, expected in zip(ours, plain(inputs[:2]), exact[2:]):
        plain_error = error(np.asarray(theirs, np.float64) / 3, expected)
        assert 0 < error(found, expected) < 0.8 * plain_error


def test_the_loss_agrees_with_optax(implementation):
    x, kernel, targets, weights = random_inputs()
    theirs = optax.softmax_cross_entropy_with_integer_labels(x @ kernel, targets)
    nll = cross_entropy(x, kernel, targets, weights, implementation=implementation)[1]
    np.testing.assert_allclose(nll, theirs, rtol=1e-5, atol=1e-5)


def test_the_losses_of_tokens_carry_no_gradient(implementation):
    x, kernel, targets, weights = random_inputs()

    def of_tokens(x):
        return cross_entropy(x, kernel, targets, weights, implementation=implementation)[1].sum()

    assert not jax.grad(of_tokens)(x).any()


def test_auto_tiles_a_batch_of_more_rows_than_a_chunk(monkeypatch):
    monkeypatch.setattr(module, "ROWS", CHUNK)
    for rows, name in ((CHUNK, "saved"), (CHUNK + 1, "tiled")):
        inputs = random_inputs(rows)
        chosen = with_gradients(inputs), with_gradients(inputs, implementation=name)
        for found, expected in zip(*chosen):
            np.testing.assert_array_equal(found, expected)


def test_what_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="unknown: choose one of auto, reference, saved, tiled"):
        cross_entropy(*random_inputs(), implementation="fast")
    for number in (0, V + 1):
        with pytest.raises(ValueError, match=f"num_valid is {number}: use 1 to {V}, or None"):
            cross_entropy(*random_inputs(), num_valid=number)


def compiled(implementation, rows, width, vocab_size, mesh, dtype=jnp.bfloat16):
    """The gradient of a vocabulary that is split over `model`, rows over `data`."""

    def array(*shape, axes=(), dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

    def gradients(x, kernel, targets, weights):
        options = dict(implementation=implementation, num_valid=vocab_size - 63)
        loss = lambda x, kernel: cross_entropy(x, kernel, targets, weights, **options)  # noqa: E731
        return jax.grad(loss, (0, 1), has_aux=True)(x, kernel)

    inner = jax.shard_map(
        gradients,
        mesh=mesh,
        in_specs=(P("data"), P(), P("data"), P("data")),
        out_specs=((P("data"), P()), P("data")),
        axis_names={"data"},
        check_vma=False,
    )
    return (
        jax.jit(inner)
        .lower(
            array(mesh.shape["data"], rows, width, axes=("data",)),
            array(width, vocab_size, axes=(None, "model")),
            array(mesh.shape["data"], rows, axes=("data",), dtype=jnp.int32),
            array(mesh.shape["data"], rows, axes=("data",), dtype=jnp.float32),
        )
        .compile()
    )


def sent_over_model(program, mesh):
    return [c for c in collectives(program.as_text(), dict(mesh.shape)) if "model" in c.axis]


@pytest.mark.parametrize("name", ["saved", "tiled"])
@pytest.mark.parametrize("data, model", [(1, 8), (2, 4)])
def test_a_split_vocabulary_is_never_gathered(name, data, model, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 16)
    mesh = make_mesh(data, model)
    rows, width, vocab_size = 40, D, 2048
    program = compiled(name, rows, width, vocab_size, mesh, jnp.float32)
    sent = sent_over_model(program, mesh)
    assert {c.kind for c in sent} == {"all-reduce"}
    # of a row, filled up to whole chunks: maximum, sum, target, and the gradient of x
    assert sum(c.size for c in sent) <= 4 * 48 * (width + 4) < 4 * rows * vocab_size / model


@pytest.mark.aot
@pytest.mark.parametrize("name", ["saved", "tiled"])
def test_no_accelerator_holds_the_logits_of_all_rows_or_gathers_a_split_vocabulary(name):
    rows, width, vocab_size = 32_768, 2048, 100_352
    mesh = make_mesh(1, 8, parse_target("h100:1x8").devices())
    program = compiled(name, rows, width, vocab_size, mesh)
    sent = sent_over_model(program, mesh)
    assert {c.kind for c in sent} == {"all-reduce"}
    assert sum(c.size for c in sent) <= 4 * rows * (width + 4)
    part = rows * vocab_size // 8  # values of all logits that a device has
    temporary = program.memory_analysis().temp_size_in_bytes
    print(f"{name}: temporary {temporary / 2**30:.2f} GiB")
    assert " scatter(" not in program.as_text()  # with deterministic operations it is a sort
    assert temporary < (4 if name == "saved" else 2) * part
