"""Stable LM 2 1.6B on one node of 8 A100-40GB: the published batch, in 128 microbatches.

    CONFIG=configs/launch/stablelm_2_1_6b_a100_40gb_1x8.py
    python -m stablelm_jax.plan --config $CONFIG
    python -m stablelm_jax.train --config $CONFIG --workdir WORKDIR

Time, energy and memory: see `plan`.
"""

from pathlib import Path

from stablelm_jax.config import load


def get_config():
    config = load(Path(__file__).parents[1] / "stablelm_2_1_6b.py")
    config.name = "stablelm_2_1_6b_a100_40gb_1x8"
    config.parallel.target = "a100-40gb:1x8"
    config.training.accumulation = 128  # ours: 2 rows a device, as published
    config.training.remat = "dots"  # ours: the memory is there
    return config
