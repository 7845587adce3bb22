"""Contract 5: every launch config compiles for its real target and fits it (extra `aot`)."""

import os

import jax
import pytest

from stablelm_jax import config as config_lib
from stablelm_jax import configs_folder
from stablelm_jax.model.parameters import count_parameters
from stablelm_jax.planning.compile import compile_for
from stablelm_jax.planning.targets import parse_target

pytestmark = pytest.mark.aot

NAMES = sorted(path.stem for path in (configs_folder() / "launch").glob("*.py"))


@pytest.fixture(autouse=True)
def optimized_as_in_a_run():
    """The other tests leave LLVM's passes out (conftest.py)."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    without = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
    jax.config.update("jax_disable_most_optimizations", without)


@pytest.mark.by_hand  # test_plan_verb.py has one compiled in every run
@pytest.mark.parametrize("name", NAMES)
def test_a_launch_config_compiles_for_its_target_and_fits(name):
    config = config_lib.load(configs_folder() / "launch" / f"{name}.py")
    step = compile_for(config, parse_target(config.parallel.target))
    assert 0 < step.argument_bytes < step.peak_bytes <= step.target.available_bytes
    if step.target.facts["kind"] == "gpu":  # TPU compilers write gathers as sums too
        _assert_gradients_are_summed_in_float32(config, step)


@pytest.mark.by_hand  # minutes each
@pytest.mark.parametrize(
    ("config", "target"),
    [
        ("stablelm_2_1_6b_32k.py", "h100:1x8"),
        ("stablelm_2_1_6b_32k.py", "v5p:4x4x4"),
        ("zephyr_1_6b.py:sft", "a100-80gb:1x8"),
        ("zephyr_1_6b.py:dpo", "h100:1x8"),
    ],
)
def test_a_longer_context_and_the_stages_of_chat_fit_the_machines_they_name(config, target):
    step = compile_for(config_lib.load(f"{configs_folder()}/{config}"), parse_target(target))
    assert 0 < step.argument_bytes < step.peak_bytes <= step.target.available_bytes


def _assert_gradients_are_summed_in_float32(config, step):
    """Once a step with ZeRO-1, once a microbatch with FSDP."""
    sums = [
        c
        for c in step.collectives
        if c.kind in ("reduce-scatter", "all-reduce") and c.axis in ("data", "replica+data")
    ]
    parameters = count_parameters(config_lib.model_config(config)) / step.mesh["model"]
    large = [c for c in sums if c.size > parameters / 100]
    assert all(c.dtype == "f32" for c in large)
    if step.mesh["data"] > 1:
        times = config.training.accumulation if config.parallel.fsdp else 1
        assert sum(c.size for c in large) == pytest.approx(4 * parameters * times, rel=0.02)


def test_every_machine_that_the_documentation_names_has_a_config():
    targets = {
        config_lib.load(configs_folder() / "launch" / f"{name}.py").parallel.target
        for name in NAMES
    }
    assert {"a100-40gb:64x8", "a100-40gb:1x8", "a100-80gb:1x8", "h100:1x8", "h200:1x1"} < targets
    assert {"v4:4x8x8", "v5e:16x16", "v5p:4x4x4", "v6e:8x8", "h100:48x8", "v5p:4x4x8"} < targets
