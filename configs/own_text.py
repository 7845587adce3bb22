"""Your own text: the smoke run's model, with Arcade100k, on the sources that you name.

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

from pathlib import Path

from stablelm_jax.config import load, parse_weights


def get_config(sources=""):
    config = load(Path(__file__).with_name("smoke.py"))
    config.name = "own_text"
    config.model.vocab_size = 100_352  # Arcade100k, padded as published
    config.data.tokenizer = "arcade100k"  # what `prepare` takes by default
    config.schedule.warmup_steps = 15  # ours: 5 % of the run
    config.schedule.total_steps = 300  # ours: the length of the run
    config.training.num_steps = 300  # ours: minutes on 2 CPU cores
    config.data.weights = parse_weights(sources)
    config.evaluation.max_rows = 64  # ours: with 100,352 rows of vocabulary each row is dear
    config.samples.prompts = ("The", "A", "In")  # ours: openings that suit many texts
    return config
