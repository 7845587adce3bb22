"""Stable LM 2 1.6B for rows of 32,768 tokens: a branch of the published run's weights.

    python -m stablelm_jax.plan --config configs/stablelm_2_1_6b_32k.py --target h100:1x8
    python -m stablelm_jax.train \
        --config configs/stablelm_2_1_6b_32k.py --workdir runs/stablelm_2_1_6b_32k

It goes on from the end of the cooldown; the published weights, by `convert from-hf`, are as good a
parent: --config.branch.parent=FOLDER. The parent's tokens a step, in rows eight times as long, fit
8 H100 and 64 chips of v5p alike with `remat full`; `plan --sweep` finds what is faster on one of
them.

Sources of the numbers: "NTK" is NTK-aware scaling as Peng et al. define it (YaRN, arXiv 2309.00071,
section 3.1, after bloc97), "Fu" the abstract of Fu et al., Data Engineering for Scaling Language
Models to 128K Context (arXiv 2402.10171), "LongRoPE" Ding et al. (arXiv 2402.13753).
"""

from pathlib import Path

from stablelm_jax.config import load


def get_config():
    config = load(Path(__file__).with_name("stablelm_2_1_6b.py"))
    config.name = "stablelm_2_1_6b_32k"
    config.branch.parent = "runs/stablelm_2_1_6b_cooldown/checkpoints/global_step500000"
    config.branch.state = "weights"

    config.data.sequence_length = 32_768  # 8 times the parent's 4,096
    # Derived from NTK: theta * s^(d / (d - 2)) with s = 8 and d = 16 rotated dims of each head of
    # 64: 10,000 * 8^(16/14) = 107,672. The slowest pair of dims then turns as far over 32,768
    # tokens as it did over 4,096 (its wavelength is 2 pi theta^(14/16), which grows 8 times), so
    # that no angle is new to it; the fastest pair turns as before. (Xiong et al., arXiv 2309.16039,
    # took Llama 2 from 4,096 to 32,768 with 500,000, where all 128 dims of a head turn.)
    config.model.rotary_theta = 107_672.0
    config.data.batch_size = 256  # derived: the parent's 8,388,608 tokens a step

    # Fu: 500 M to 5 G tokens are enough. Derived: 5 G / 8,388,608 = 596 steps.
    config.training.num_steps = 596
    config.schedule.kind = "cosine"  # ours; LongRoPE: a linear decay
    config.schedule.peak = 2e-5  # LongRoPE: for 7 G parameters; a smaller model may take more
    config.schedule.minimum = 0.0  # ours: the branch ends with its cooldown
    config.schedule.total_steps = 596
    config.schedule.warmup_steps = 20  # ours: fresh moments need some

    config.training.accumulation = 4  # derived: one row at a time for each of 64 chips
    config.training.remat = "full"  # ours: eight rows at a time fit an H100
    config.checkpoint.every = 100  # ours, as the next three: a few of each
    config.checkpoint.keep_every = 100
    config.evaluation.every = 100
    config.evaluation.max_rows = 32  # as many tokens as 256 rows of the parent
    config.samples.every = 100
    return config
