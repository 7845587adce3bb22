"""Your own text: a small model with Arcade100k, in minutes, on the sources that you name.

Three commands:

    python -m stablelm_jax.prepare --source mine --input my_texts --output data
    python -m stablelm_jax.train --config configs/own_text.py:mine --workdir runs/mine
    python -m stablelm_jax.generate --checkpoint runs/mine/checkpoints/global_step300 --prompt "The"

After the colon come the sources, with weights if there are several: `:mine=0.7,other=0.3`. Only
their ratio matters; a source without a weight has 1. Any field can follow, as in
`--config.training.num_steps=2000` or `--config.data.weights.mine=2.0`.

Time: about 3 seconds a step on 2 CPU cores, nearly all of it in the vocabulary; a smaller one is
`python -m stablelm_jax.train_tokenizer` away. Result: depends on the text; the run
prints each source's unigram entropy, which the held-out loss should soon be below.
"""

from stablelm_jax.config import default_config, parse_weights


def get_config(sources=""):
    config = default_config()
    config.name = "own_text"

    # The size is ours, chosen to be trained in minutes by 2 CPU cores.
    config.model.vocab_size = 100_352  # Arcade100k, padded as published
    config.model.num_layers = 4
    config.model.width = 192
    config.model.num_heads = 3  # heads of 64, the 1.6B's
    config.model.num_kv_heads = 3  # no grouping, as the 1.6B
    config.model.feed_forward_width = 512  # 8/3 of the width, the 1.6B's rule

    config.data.weights = parse_weights(sources)
    config.data.tokenizer = "arcade100k"  # what `prepare` takes by default
    config.data.sequence_length = 256  # ours
    config.data.batch_size = 8  # ours, 2,048 tokens a step

    # AdamW and the hybrid schedule as published for the 1.6B: the defaults.
    config.schedule.peak = 3e-3  # ours: a small model takes more than the 1.6B's 1e-3
    config.schedule.minimum = 3e-4  # a tenth of the peak, the 1.6B's ratio
    config.schedule.warmup_steps = 15  # ours: 5 % of the run
    config.schedule.total_steps = 300  # ours: the length of the run

    config.training.num_steps = 300  # ours: minutes on 2 CPU cores
    config.training.dtype = "float32"  # bfloat16 is slow on CPUs
    config.training.log_every = 1  # every step in metrics.jsonl

    # Ours: a few of each in a run of minutes.
    config.checkpoint.every = 100
    config.evaluation.every = 100
    config.evaluation.max_rows = 64  # ours: with 100,352 rows of vocabulary each row is dear
    config.samples.every = 200
    config.samples.prompts = ("The", "A", "In")  # ours: openings that suit many texts
    return config
