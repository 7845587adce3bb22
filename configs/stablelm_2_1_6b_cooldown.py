"""The end of Stable LM 2 1.6B: from global_step420000, 80,000 steps linearly down to zero.

    python -m stablelm_jax.train \
        --config configs/stablelm_2_1_6b_cooldown.py --workdir runs/cooldown

is a branch of the run of configs/stablelm_2_1_6b.py: another checkpoint of it is named by
--config.branch.parent=WORKDIR/checkpoints/global_step420000. Published: 0.67 T tokens, so that the
model ends at 4.19 T; the scores of its card are those after it.

Two sources disagree on where the cooldown begins. The schedule itself stands at 2.170e-4 at step
420,000; the card of the published branch says 2.529e-4, which no natural reading of the schedule
gives. By default the learning rate is continuous; `configs/stablelm_2_1_6b_cooldown.py:published`
begins with the card's.
"""

from pathlib import Path

from stablelm_jax.config import load


def get_config(start="continuous"):
    config = load(Path(__file__).with_name("stablelm_2_1_6b.py"))
    config.name = "stablelm_2_1_6b_cooldown"
    config.branch.parent = "runs/stablelm_2_1_6b/checkpoints/global_step420000"
    config.schedule.cooldown_start = 420_000  # branch: the card of global_step420000
    config.schedule.cooldown_steps = 80_000  # report, as others retell it
    config.schedule.cooldown_end = 0.0  # branch
    config.training.num_steps = 500_000  # derived: 420,000 + 80,000
    if start == "published":
        config.schedule.cooldown_learning_rate = 2.529e-4  # branch
    elif start != "continuous":
        raise ValueError(f"{start!r}: write nothing after the colon, or published")
    return config
