"""Stable LM 2 12B on 128 chips of TPU v5p (v5p-256).

    CONFIG=configs/launch/stablelm_2_12b_v5p_4x4x8.py
    python -m stablelm_jax.plan --config $CONFIG
    bash launch/tpu_pod.sh run --name NAME --zone ZONE --accelerator-type v5p-256 \\
        --config $CONFIG --workdir gs://BUCKET/RUN

Time, energy and memory: see `plan`.
"""

from pathlib import Path

from stablelm_jax.config import load


def get_config():
    config = load(Path(__file__).parents[1] / "stablelm_2_12b.py")
    config.name = "stablelm_2_12b_v5p_4x4x8"
    config.parallel.target = "v5p:4x4x8"
    config.training.accumulation = 6  # ours: 2 rows a device
    config.training.remat = "dots"  # ours: the memory is there
    config.parallel.model = 1  # ours: the chip's links carry FSDP
    config.parallel.fsdp = True  # ours: no chip holds 12 B weights and their gradients
    return config
