"""154 M parameters on one GPU in hours: the step between the smoke run and the 1.6B.

    python -m stablelm_jax.prepare --source web --input 'texts/*.parquet' --output data
    python -m stablelm_jax.plan --config configs/recipe_150m.py:web --target a100-40gb:1x1
    python -m stablelm_jax.train --config configs/recipe_150m.py:web --workdir runs/recipe_150m

Bring 3 G tokens of clean text (13 GB of English); after the colon come the sources, with weights if
there are several: `:web=0.9,code=0.1`. Everything is the 1.6B's but the size: tokenizer, heads of
64, ratio of the feed-forward, AdamW, the hybrid schedule with its cooldown at the same shares.

Time, from `plan` at an MFU of 35 %: 8.2 hours on an A100, 2.6 on an H100 or H200. A third of the
work is the vocabulary's 100,352 columns.

Loss to expect: about 3.5 nats a token of English web text at the end, 1.1 to 1.2 bits a byte. It is
an estimate, not a run: the fit of Hoffmann et al. (2022) in the correction of Besiroglu et al.
(2024), 1.817 + 482 / N^0.348 + 2085 / D^0.366, gives 3.20 for N = 154 M and D = 3.15 G tokens of a
32,000-token vocabulary; Arcade100k's tokens are about a tenth longer.
"""

from pathlib import Path

from stablelm_jax.config import load, parse_weights


def get_config(sources=""):
    config = load(Path(__file__).with_name("stablelm_2_1_6b.py"))
    config.name = "recipe_150m"
    config.seed = 1234
    config.model.num_layers = 16  # ours: 51 M parameters beside the vocabulary's 103 M
    config.model.width = 512  # ours
    config.model.num_heads = 8  # heads of 64, the 1.6B's
    config.model.num_kv_heads = 8  # no grouping, as the 1.6B
    config.model.feed_forward_width = 1408  # 2.75 of the width, the 1.6B's ratio
    config.data.weights = parse_weights(sources)
    config.data.batch_size = 128  # ours: 524,288 tokens a step

    config.schedule.peak = 2e-3  # ours: a small model takes more than the 1.6B's 1e-3
    config.schedule.minimum = 2e-4  # a tenth of the peak, the 1.6B's ratio
    # Shares of N as in the published run: warmup 1.8 %, cooldown from 7/9 of it for 4/27 of it.
    config.schedule.total_steps = 6480
    config.schedule.warmup_steps = 117
    config.schedule.cooldown_start = 5040
    config.schedule.cooldown_steps = 960

    config.training.num_steps = 6000  # 3.15 G tokens: 20 a parameter
    config.training.accumulation = 16  # ours: 8 rows at a time
    config.training.remat = "dots"  # ours: fits 40 GB

    # Ours: a few of each in a run of hours.
    config.checkpoint.every = 500
    config.checkpoint.keep_every = 5000
    config.evaluation.every = 500
    config.samples.every = 1000
    return config
