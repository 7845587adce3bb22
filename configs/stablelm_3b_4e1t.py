"""StableLM-3B-4E1T, as published but for its data weights, which are not known: give your own.

    python -m stablelm_jax.train --workdir runs/stablelm_3b_4e1t \\
        --config configs/stablelm_3b_4e1t.py:refinedweb=0.6,redpajama=0.2,pile=0.1,starcoder=0.1 \\
        --config.data.tokenizer=GPT_NEOX/tokenizer.json

(The card names these four data sets: Falcon RefinedWeb, RedPajama-Data and The Pile without Books3,
StarCoder. The weights in the line above are an example, not the published ones.) The tokenizer is
GPT-NeoX's tokenizer.json, which `prepare` needs too.

Published: 256 A100-40GB, about 30 days. 955,000 steps are 4.0 T tokens. Expect on the Open LLM
Leaderboard's six tasks an average of 46.6 (model card). One difference: the published run attended
across the documents of a row (its config has no reset_attention_mask), this project never does.

Sources of the numbers: "config" is Stability-AI/StableLM configs/stablelm-3b-4e1t.yml, "card" the
model card of stabilityai/stablelm-3b-4e1t, "NeoX" a default of EleutherAI/gpt-neox.
"""

import dataclasses

from ml_collections.config_dict import placeholder

from stablelm_jax.config import default_config, parse_weights
from stablelm_jax.model.config import STABLELM_3B_4E1T


def get_config(sources=""):
    config = default_config()
    config.name = "stablelm_3b_4e1t"
    config.seed = 1234  # NeoX
    config.model.update(dataclasses.asdict(STABLELM_3B_4E1T))  # sources beside the named size

    config.data.tokenizer = placeholder(str)  # config: GPT-NeoX's; the user has the file
    config.data.weights = parse_weights(sources)
    config.data.sequence_length = 4096  # config
    # Derived from config: 256 GPUs x 4 rows = 1,024 rows, 4,194,304 tokens.
    config.data.batch_size = 1024

    config.optimizer.b1 = 0.9  # config, as the next four
    config.optimizer.b2 = 0.95
    config.optimizer.epsilon = 1e-6
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0

    config.schedule.kind = "cosine"  # config
    config.schedule.peak = 3.2e-4  # config
    config.schedule.minimum = 1.28e-5  # config
    config.schedule.total_steps = 955_000  # config
    config.schedule.warmup_steps = 4_775  # derived: config's 0.005 of 955,000
    config.schedule.shift_warmup = True  # NeoX: its cosine counts from the end of the warmup

    config.training.num_steps = 955_000  # config
    config.training.accumulation = 1  # config
    config.training.dtype = "bfloat16"  # config
    config.training.remat = "full"  # config: checkpoint-activations
    config.training.log_every = 10  # config

    config.parallel.data = -1  # config: 256, all of them
    config.parallel.model = 1  # config
    config.parallel.zero1 = True  # config: ZeRO stage 1

    config.checkpoint.every = 2_000  # config
    config.checkpoint.keep_every = 10_000  # config: its interval of copies to storage
    config.checkpoint.save_initial = True  # config: an extra save at step 0
    config.evaluation.every = 5_000  # config
    config.samples.every = 5_000  # ours: with the evaluation
    return config
