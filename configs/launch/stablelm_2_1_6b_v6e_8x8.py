"""Stable LM 2 1.6B on 64 chips of TPU v6e.

    CONFIG=configs/launch/stablelm_2_1_6b_v6e_8x8.py
    python -m stablelm_jax.plan --config $CONFIG
    bash launch/tpu_pod.sh run --name NAME --zone ZONE --accelerator-type v6e-64 \\
        --config $CONFIG --workdir gs://BUCKET/RUN

Time, energy and memory: see `plan`.
"""

from pathlib import Path

from stablelm_jax.config import load


def get_config():
    config = load(Path(__file__).parents[1] / "stablelm_2_1_6b.py")
    config.name = "stablelm_2_1_6b_v6e_8x8"
    config.parallel.target = "v6e:8x8"
    config.training.accumulation = 16  # ours: 2 rows a device
    config.training.remat = "dots"  # ours: the memory is there
    return config
