"""A Stable LM 2 in miniature, on text that every Python machine already holds. The first run.

    bash launch/smoke.sh        # installs, prepares the two sources, trains, evaluates, samples

whose training step is `python -m stablelm_jax.train --config configs/smoke.py --workdir ...`.

Everything is shaped as in the 1.6B (heads of 64, a quarter of them rotated, SwiGLU, untied
embeddings, the hybrid schedule), only small, but for the tokenizer: it has Arcade100k's rules and
4,096 tokens learned from the text. With Arcade100k's 100,352 rows a model of this size spends 95 %
of its time in the vocabulary.

Time and result (2 CPU cores, 2026-11-28): 6 minutes with installation, 5 of them training; the
held-out loss of stdlib_code ends at 5.33 nats, standard error 0.13 over 36 documents (unigram
entropy 6.63), of package_docs at 5.72, 0.23 over 3 documents (6.67). A machine with other packages
installed has other package_docs.
"""

from stablelm_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "smoke"

    # The size is ours, chosen to be trained in minutes by 2 CPU cores.
    config.model.vocab_size = 4096  # the tokenizer that launch/smoke.sh trains on this very text
    config.model.num_layers = 4
    config.model.width = 192
    config.model.num_heads = 3  # heads of 64, the 1.6B's
    config.model.num_kv_heads = 3  # no grouping, as the 1.6B
    config.model.feed_forward_width = 512  # 8/3 of the width, the 1.6B's rule

    config.data.tokenizer = "runs/smoke/corpus/tokenizer.json"  # launch/smoke.sh names its own
    # Ours: code is plentiful (12 MB), the descriptions of packages are not (1 MB).
    config.data.weights.stdlib_code = 0.7
    config.data.weights.package_docs = 0.3
    config.data.sequence_length = 256  # ours: attention is then a small part of a step
    config.data.batch_size = 8  # ours, 2,048 tokens a step

    # AdamW as published for the 1.6B: the defaults.

    config.schedule.peak = 3e-3  # ours: a small model takes more than the 1.6B's 1e-3
    config.schedule.minimum = 3e-4  # a tenth of the peak, the 1.6B's ratio
    config.schedule.warmup_steps = 20  # ours: 5 % of the run (1.6B: 2 %)
    config.schedule.total_steps = 400  # ours: the length of the run

    config.training.num_steps = 400  # ours: minutes
    config.training.dtype = "float32"  # bfloat16 is slow on CPUs
    config.training.log_every = 1  # every step in metrics.jsonl

    # Ours: a few of each in a run of minutes.
    config.checkpoint.every = 100
    config.evaluation.every = 100
    config.evaluation.max_rows = 700  # all that is held out: fewer rows are a handful of documents
    config.samples.every = 200
    config.samples.prompts = ("def read_", "This package provides")
    return config
