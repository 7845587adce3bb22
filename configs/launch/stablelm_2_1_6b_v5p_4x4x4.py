"""Stable LM 2 1.6B on 64 chips of TPU v5p (v5p-128).

    CONFIG=configs/launch/stablelm_2_1_6b_v5p_4x4x4.py
    python -m stablelm_jax.plan --config $CONFIG
    bash launch/tpu_pod.sh run --name NAME --zone ZONE --accelerator-type v5p-128 \\
        --config $CONFIG --workdir gs://BUCKET/RUN

Time, energy and memory: see `plan`.
"""

from pathlib import Path

from stablelm_jax.config import load


def get_config():
    config = load(Path(__file__).parents[1] / "stablelm_2_1_6b.py")
    config.name = "stablelm_2_1_6b_v5p_4x4x4"
    config.parallel.target = "v5p:4x4x4"
    config.training.accumulation = 4  # ours: 8 rows a device
    config.training.remat = "dots"  # ours: the memory is there
    return config
