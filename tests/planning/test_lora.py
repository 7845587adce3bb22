"""What `plan` says of adapters."""

import pytest

from stablelm_jax import config as config_lib
from stablelm_jax import configs_folder
from stablelm_jax.model.config import STABLELM_2_1_6B
from stablelm_jax.model.parameters import count_parameters
from stablelm_jax.planning import report
from stablelm_jax.planning.compile import DoesNotFit, compile_for
from stablelm_jax.planning.estimate import divided
from stablelm_jax.planning.targets import parse_target

ONE_CARD = {
    "lora.rank": 16,
    "data.batch_size": 1,
    "training.accumulation": 1,
    "training.remat": "full",
}


def zephyr(stage, **more):
    config = config_lib.load(f"{configs_folder()}/zephyr_1_6b.py:{stage}")
    return divided(config, ONE_CARD | more)


def test_a_plan_counts_adapters_and_the_frozen_weights_apart(capsys):
    report.plan(zephyr("sft"), None)
    text = capsys.readouterr().out
    # In each of 24 layers, 16 x (inputs + outputs) of four matrices of 2048 x 2048 and three of
    # 2048 x 5632; in a checkpoint three float32 of each.
    trained = 24 * 16 * (4 * (2048 + 2048) + 3 * (2048 + 5632))
    assert f"{trained:,}" in text and f"{12 * trained / 1e9:.3f}" in text
    frozen = next(line for line in text.splitlines() if "frozen, bfloat16" in line)
    count = count_parameters(STABLELM_2_1_6B)
    assert f"{count:,}" in frozen and f"{2 * count / 2**20:,.2f}" in frozen


@pytest.mark.aot
@pytest.mark.by_hand
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_adapters_of_the_1_6b_fit_a_card_of_24_gb_and_full_tuning_does_not(stage):
    target = parse_target("rtx4090:1x1")
    step = compile_for(zephyr(stage), target)
    assert 3.2 < step.argument_bytes / 2**30 < 3.4 and step.peak_bytes < 9 * 2**30
    with pytest.raises(DoesNotFit, match="rtx4090"):
        compile_for(zephyr(stage, **{"lora.rank": 0}), target)
