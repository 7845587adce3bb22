"""Stable LM 2 1.6B on 256 chips of TPU v4 (v4-512).

    CONFIG=configs/launch/stablelm_2_1_6b_v4_4x8x8.py
    python -m stablelm_jax.plan --config $CONFIG
    bash launch/tpu_pod.sh run --name NAME --zone ZONE --accelerator-type v4-512 \\
        --config $CONFIG --workdir gs://BUCKET/RUN

Time, energy and memory: see `plan`.
"""

from pathlib import Path

from stablelm_jax.config import load


def get_config():
    config = load(Path(__file__).parents[1] / "stablelm_2_1_6b.py")
    config.name = "stablelm_2_1_6b_v4_4x8x8"
    config.parallel.target = "v4:4x8x8"
    config.training.accumulation = 4  # ours: 2 rows a device
    config.training.remat = "dots"  # ours: the memory is there
    return config
