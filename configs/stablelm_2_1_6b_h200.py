"""Stable LM 2 1.6B on one H200: launch/stablelm_2_1_6b_h200_1x1.py under a shorter name.

    python benchmarks/train_step.py --config configs/stablelm_2_1_6b_h200.py

Time: see `plan`; benchmarks take one microbatch of it.
"""

from pathlib import Path

from stablelm_jax.config import load


def get_config():
    config = load(Path(__file__).parent / "launch" / "stablelm_2_1_6b_h200_1x1.py")
    config.name = "stablelm_2_1_6b_h200"
    return config
