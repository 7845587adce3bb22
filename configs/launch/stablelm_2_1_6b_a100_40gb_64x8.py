"""Stable LM 2 1.6B as published, on the published machine: 64 nodes of 8 A100-40GB.

    python -m stablelm_jax.plan --config configs/launch/stablelm_2_1_6b_a100_40gb_64x8.py
    sbatch --nodes 64 launch/slurm.sbatch configs/launch/stablelm_2_1_6b_a100_40gb_64x8.py WORKDIR

Published: about 92,000 GPU-hours with the cooldown. Every number is the parent's.
"""

from pathlib import Path

from stablelm_jax.config import load


def get_config():
    config = load(Path(__file__).parents[1] / "stablelm_2_1_6b.py")
    config.name = "stablelm_2_1_6b_a100_40gb_64x8"
    config.parallel.target = "a100-40gb:64x8"  # card: 512 A100-40GB
    return config
