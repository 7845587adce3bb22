"""Stable LM 2 12B on the published machine: 48 nodes of 8 H100, split over pairs.

    CONFIG=configs/launch/stablelm_2_12b_h100_48x8.py
    python -m stablelm_jax.plan --config $CONFIG
    sbatch --nodes 48 launch/slurm.sbatch $CONFIG WORKDIR

Time, energy and memory: see `plan`.
"""

from pathlib import Path

from stablelm_jax.config import load


def get_config():
    config = load(Path(__file__).parents[1] / "stablelm_2_12b.py")
    config.name = "stablelm_2_12b_h100_48x8"
    config.parallel.target = "h100:48x8"
    config.parallel.replica = 3  # ours: 64 divides every matrix, the 192 that model leaves do not
    return config
