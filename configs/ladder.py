"""Small sizes of Stable LM 2 by one rule: what they show, fitted, foretells the large one.

    python -m stablelm_jax.plan --config configs/ladder.py:45m --target h100:1x1
    python -m stablelm_jax.train --config configs/ladder.py:20m,web=0.9,code=0.1 \
        --workdir runs/ladder/20m
    python -m stablelm_jax.report --fit runs/ladder/*

After the colon comes the size, and after it the sources, as for recipe_150m.py; without sources
they are the 1.6B's own 28 with its weights. Any size goes, in millions of parameters: the rungs are
20m, 45m, 90m, 150m, 300m. The rule: heads of 64, 32 of width a layer, and of such models the one
whose parameters, the vocabulary's two matrices with them, come nearest to the name by ratio:

    rung    layers x width    parameters    beside the vocabulary    tokens
    20m           4 x 128        26.5 M             0.8 M             0.53 G
    45m           6 x 192        41.3 M             2.7 M             0.82 G
    90m          12 x 384        98.8 M            21.7 M             1.98 G
    150m         16 x 512       154.2 M            51.4 M             3.08 G
    300m         22 x 704       274.9 M           133.6 M             5.50 G

Arcade100k's 100,352 rows are most of a small rung; below 20m there is no size but a single head.
Tokens are 20 a parameter; batch and learning rate follow from them. docs/comparing.md says what
each costs, and how to train a ladder on other data and another tokenizer.
"""

import math
import re
from pathlib import Path

from stablelm_jax.config import ConfigError, load, model_config, parse_weights
from stablelm_jax.model.parameters import count_parameters


def get_config(text="20m"):
    size, _, sources = text.partition(",")
    if not re.fullmatch(r"[1-9]\d*m", size) or not 20 <= int(size[:-1]) <= 1600:
        raise ConfigError(
            f"configs/ladder.py:{text}: names no size from 20m to 1600m; write 20m, or 20m,mine=1"
        )
    config = load(Path(__file__).with_name("stablelm_2_1_6b.py"))
    config.name = f"ladder_{size}"
    config.model.update(shape(config, 1e6 * int(size[:-1])))
    if sources:
        config.data.weights = parse_weights(sources)

    parameters = count_parameters(model_config(config))
    tokens = 20 * parameters  # Hoffmann et al. (2022), approaches 1 and 2: about 20 a parameter
    # Bi et al. (2024, DeepSeek LLM), equation 1: tokens a step and peak of the learning rate by
    # compute, theirs without the embeddings', here 6 N D with all parameters. NOT RE-VERIFIED: the
    # four constants were not read in the original.
    compute = 6 * parameters * tokens
    rows = 0.2920 * compute**0.3271 / config.data.sequence_length
    config.data.batch_size = 8 * max(1, round(rows / 8))  # ours: 8 devices divide it
    config.schedule.peak = float(f"{0.3118 * compute**-0.1250:.2g}")
    config.schedule.minimum = config.schedule.peak / 10  # the 1.6B's ratio

    steps = round(tokens / (config.data.batch_size * config.data.sequence_length))
    config.training.num_steps = steps
    # Shares of N as in the published run: warmup 1.8 %, cooldown from 7/9 of it for 4/27 of it,
    # where the run ends. So each rung ends at a learning rate of 0, and ends compare.
    config.schedule.total_steps = round(steps * 27 / 25)
    config.schedule.warmup_steps = round(0.018 * config.schedule.total_steps)
    config.schedule.cooldown_start = steps - round(steps * 4 / 25)
    config.schedule.cooldown_steps = round(steps * 4 / 25)

    config.training.accumulation = config.data.batch_size // 8  # ours: 8 rows at a time
    config.training.remat = "dots"  # ours: fits 40 GB

    # Ours: a few of each in a run of hours.
    config.checkpoint.every = 500
    config.checkpoint.keep_every = 5000
    config.evaluation.every = 500
    config.samples.every = 1000
    return config


def shape(config, parameters):
    """Layers, width and what follows from it, of the model nearest to so many parameters."""

    def of_width(width):
        return {
            "num_layers": width // 32,  # ours: recipe_150m.py's 16 layers of 512
            "width": width,
            "num_heads": width // 64,  # heads of 64, the 1.6B's
            "num_kv_heads": width // 64,  # no grouping, as the 1.6B
            "feed_forward_width": width * 11 // 4,  # 2.75 of the width, the 1.6B's ratio
        }

    def distance(width):
        model = config.copy_and_resolve_references()
        model.model.update(of_width(width))
        return abs(math.log(count_parameters(model_config(model)) / parameters))

    return of_width(min(range(64, 2049, 64), key=distance))
