import pytest

from stablelm_jax.model.config import STABLELM_2_1_6B, STABLELM_2_12B
from stablelm_jax.model.flops import flops_per_token, train_flops_per_token
from stablelm_jax.model.parameters import parameter_table


@pytest.mark.parametrize("causal, giga", [(False, 11.048), (True, 9.840)])
def test_the_1_6b_at_4096_costs_what_its_shapes_say(causal, giga):
    found = train_flops_per_token(STABLELM_2_1_6B, 4096, causal)
    assert found / 1e9 == pytest.approx(giga, abs=5e-4)


@pytest.mark.parametrize("model", [STABLELM_2_1_6B, STABLELM_2_12B])
def test_matrix_work_is_two_operations_for_each_weight_but_the_embedding(model):
    weights = sum(row.count for row in parameter_table(model) if row.name.endswith("kernel"))
    parts = flops_per_token(model, 4096)
    assert sum(parts.values()) - parts["attention_scores"] == 2 * weights
