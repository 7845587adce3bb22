"""Stable LM 2 1.6B on one H200: the published batch, in 256 microbatches.

    CONFIG=configs/launch/stablelm_2_1_6b_h200_1x1.py
    python -m stablelm_jax.plan --config $CONFIG
    python -m stablelm_jax.train --config $CONFIG --workdir WORKDIR

Time: see `plan`; the whole run would take years, so set training.num_steps.
"""

from pathlib import Path

from stablelm_jax.config import load


def get_config():
    config = load(Path(__file__).parents[1] / "stablelm_2_1_6b.py")
    config.name = "stablelm_2_1_6b_h200_1x1"
    config.parallel.target = "h200:1x1"
    config.training.accumulation = 256  # ours: 8 rows, as the compiler's memory allows
    config.training.remat = "dots"  # ours: the memory is there, a third of the work is saved
    return config
