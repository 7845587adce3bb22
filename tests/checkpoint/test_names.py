import pytest

from stablelm_jax.checkpoint.names import checkpoint_name, checkpoint_step


@pytest.mark.parametrize("step", [0, 7, 420_000])
def test_a_name_and_its_step_belong_together(step):
    assert checkpoint_name(step) == f"global_step{step}"
    assert checkpoint_step(checkpoint_name(step)) == step


@pytest.mark.parametrize(
    "name",
    ["global_step", "global_step_7", "global_step07", "step7", "global_step7.orbax-checkpoint-tmp"],
)
def test_other_names_are_no_checkpoints(name):
    assert checkpoint_step(name) is None
