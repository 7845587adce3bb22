"""Stable LM 2 12B, as published: what differs from the 1.6B.

    python -m stablelm_jax.train --config configs/stablelm_2_12b.py --workdir runs/stablelm_2_12b

Published: 384 H100, tensor-parallel over pairs. 760,000 steps are 4.78 T tokens; where the
published run stopped is not known (its card says 2 T tokens for two epochs). Expect on the Open LLM
Leaderboard's six tasks an average of 63.5 (model card).

Sources of the numbers: "config" is Stability-AI/StableLM configs/stablelm-2-12b.yml, "card" the
model card of stabilityai/stablelm-2-12b.
"""

import dataclasses
from pathlib import Path

from stablelm_jax.config import load
from stablelm_jax.model.config import STABLELM_2_12B


def get_config():
    # With its data weights: the card describes the same data as the 1.6B's; that the weights are
    # the same is an assumption.
    config = load(Path(__file__).with_name("stablelm_2_1_6b.py"))
    config.name = "stablelm_2_12b"
    config.seed = 2_345_678_926  # config
    config.model.update(dataclasses.asdict(STABLELM_2_12B))  # sources beside the named size

    # Derived from config: 384 GPUs / 2 x 1 row x 8 microbatches = 1,536 rows, 6,291,456 tokens.
    config.data.batch_size = 1536
    config.optimizer.clip_norm = 0.75  # config

    config.schedule.peak = 3e-4  # config
    config.schedule.minimum = 3e-5  # config
    config.schedule.total_steps = 760_000  # config
    config.schedule.warmup_steps = 4_940  # derived: config's 0.0065 of 760,000

    config.training.num_steps = 760_000  # config
    config.training.accumulation = 8  # config
    config.parallel.model = 2  # config
    config.evaluation.every = 5_000  # config
    return config
