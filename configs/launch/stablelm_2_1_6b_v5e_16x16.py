"""Stable LM 2 1.6B on a whole pod of TPU v5e, 256 chips of 16 GB.

    CONFIG=configs/launch/stablelm_2_1_6b_v5e_16x16.py
    python -m stablelm_jax.plan --config $CONFIG
    bash launch/tpu_pod.sh run --name NAME --zone ZONE --accelerator-type v5litepod-256 \\
        --config $CONFIG --workdir gs://BUCKET/RUN

Time, energy and memory: see `plan`.
"""

from pathlib import Path

from stablelm_jax.config import load


def get_config():
    config = load(Path(__file__).parents[1] / "stablelm_2_1_6b.py")
    config.name = "stablelm_2_1_6b_v5e_16x16"
    config.parallel.target = "v5e:16x16"
    config.training.accumulation = 4  # ours: 2 rows a device
    config.training.remat = "attention"  # ours: half a GB saves its second run
    config.parallel.fsdp = True  # ours: the whole copy that ZeRO-1 gathers does not fit
    return config
