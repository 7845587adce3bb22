"""A Stable LM 2 in miniature, on English that every installation holds. The first run.

    bash launch/smoke.sh        # installs, prepares the two sources, trains, evaluates, samples

whose training step is `python -m stablelm_jax.train --config configs/smoke.py --workdir ...`.

Everything is shaped as in the 1.6B (heads of 64, a quarter of them rotated, SwiGLU, untied
embeddings), only small, but for what makes it write English within minutes: a tokenizer of
Arcade100k's rules and 4,096 tokens learned from the text, rows of 128 tokens, Muon in place of
AdamW, and a cosine to zero. What each of these is worth, and what was worse: docs/log.md,
2026-11-29.

Time and result (2 CPU cores, 2026-11-29): 5 minutes with installation, 4 of them training;
held-out text of package_docs ends at 1.49 bits a byte, of python_docs at 1.65 (loss 4.11 and 4.36
nats, unigram entropy 6.76 and 6.60), standard errors 0.04 and 0.07 nats. Samples have the form of
sentences and now and then sense. Other releases of the packages give other text.
"""

from stablelm_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "smoke"

    # The size is ours: of those that learn as long on 2 CPU cores, the one of least held-out loss.
    config.model.vocab_size = 4096  # the tokenizer that launch/smoke.sh trains on this very text
    config.model.num_layers = 4
    config.model.width = 128
    config.model.num_heads = 2  # heads of 64, the 1.6B's
    config.model.num_kv_heads = 2  # no grouping, as the 1.6B
    config.model.feed_forward_width = 384  # 3 of the width (1.6B: 2.75)

    config.data.tokenizer = "runs/smoke/corpus/tokenizer.json"  # launch/smoke.sh names its own
    config.data.weights.python_docs = 0.3  # as they are long: 1.1 MB
    config.data.weights.package_docs = 0.7  # 2.6 MB
    config.data.sequence_length = 128  # ours: most docstrings are shorter
    config.data.batch_size = 16  # ours, 2,048 tokens a step

    config.optimizer.kind = "muon"  # ours: worth more here than any other choice but the text

    config.schedule.kind = "cosine"
    config.schedule.peak = 1e-2  # ours: ten times the 1.6B's
    config.schedule.minimum = 0.0
    config.schedule.warmup_steps = 100  # ours: 5 % of the run (1.6B: 2 %)
    config.schedule.total_steps = 2000  # ours: the length of the run

    config.training.num_steps = 2000  # ours: minutes
    config.training.dtype = "float32"  # bfloat16 is slow on CPUs
    config.training.log_every = 1  # every step in metrics.jsonl

    # Ours: a few of each in a run of minutes.
    config.checkpoint.every = 400
    config.evaluation.every = 400
    config.evaluation.max_rows = 300  # all that is held out
    config.samples.every = 400
    config.samples.prompts = ("Return the", "If the", "The name of")
    return config
