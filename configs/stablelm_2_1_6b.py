"""Stable LM 2 1.6B, as published, up to the checkpoint before the cooldown (global_step420000).

    python -m stablelm_jax.train --config configs/stablelm_2_1_6b.py --workdir runs/stablelm_2_1_6b

Published: 512 A100-40GB, about 92,000 GPU-hours with the cooldown. 420,000 steps are 3.52 T tokens.
Expect on the Open LLM Leaderboard's six tasks an average of 45.5 (model card) after the cooldown
to step 500,000.

Sources of the numbers: "config" is Stability-AI/StableLM configs/stablelm-2-1_6b.yml, "card" the
model card of stabilityai/stablelm-2-1_6b, "branch" its branch global_step420000, "report" the
technical report (arXiv 2402.17834).
"""

import dataclasses

from stablelm_jax.config import default_config
from stablelm_jax.model.config import STABLELM_2_1_6B

# NOT RE-VERIFIED: the report's table of weights was not read in the original. Each weight agrees
# with its reported tokens over their sum to 1e-4, and the tokens add up to the reported total.
WEIGHTS = {
    # academic
    "arxiv": 0.0079,
    "pubmed": 0.0120,
    "s2orc": 0.0318,
    "philpapers": 0.0013,
    # books
    "bookcorpus_open": 0.0045,
    "pg19": 0.0091,
    "fanfics": 0.0018,
    # web
    "culturax_en": 0.2521,
    "culturax_es": 0.0155,
    "culturax_de": 0.0152,
    "culturax_fr": 0.0097,
    "culturax_it": 0.0096,
    "culturax_nl": 0.0097,
    "culturax_pt": 0.0100,
    "c4": 0.0855,
    "openwebtext2": 0.0130,
    "refinedweb": 0.3292,
    # social
    "stackexchange": 0.0231,
    "hackernews": 0.0019,
    # law
    "europarl": 0.0023,
    "freelaw": 0.0088,
    "pile_of_law": 0.0063,
    # mathematics
    "dm_math": 0.0066,
    "amps": 0.0011,
    "openwebmath": 0.0132,
    # encyclopedia, code, instructions
    "redpajama_wiki": 0.0363,
    "starcoder": 0.0724,
    "restruct_v1": 0.0102,
}


def get_config():
    config = default_config()
    config.name = "stablelm_2_1_6b"
    config.seed = 1234  # config
    config.model.update(dataclasses.asdict(STABLELM_2_1_6B))  # sources beside the named size

    config.data.tokenizer = "arcade100k"  # config, card
    config.data.weights = WEIGHTS
    config.data.sequence_length = 4096  # config
    # Derived from config: 512 GPUs x 2 rows x 2 microbatches = 2,048 rows, 8,388,608 tokens.
    config.data.batch_size = 2048

    config.optimizer.b1 = 0.9  # config, as the next four
    config.optimizer.b2 = 0.95
    config.optimizer.epsilon = 1e-8
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0

    config.schedule.kind = "hybrid"  # config (hybrid_cosine_inv_sqrt_2); form as the report's
    config.schedule.peak = 1e-3  # config
    config.schedule.minimum = 1e-4  # config
    config.schedule.total_steps = 540_000  # config
    config.schedule.warmup_steps = 9_720  # derived: config's 0.018 of 540,000
    config.schedule.transition = 0.25  # report, as others retell it: cosine up to N/4

    config.training.num_steps = 420_000  # branch; the cooldown is a run of its own
    config.training.accumulation = 2  # config
    config.training.dtype = "bfloat16"  # config
    config.training.remat = "full"  # config: checkpoint-activations
    config.training.log_every = 10  # config

    config.parallel.data = -1  # config: 512, all of them
    config.parallel.model = 1  # config
    config.parallel.zero1 = True  # config: ZeRO stage 1

    config.checkpoint.every = 2_000  # config
    config.checkpoint.keep_every = 20_000  # config: its interval of copies to storage
    config.checkpoint.save_initial = True  # config: an extra save at step 0
    config.evaluation.every = 10_000  # ours: the published run did not evaluate as it went
    config.samples.every = 10_000  # ours: with the evaluation
    return config
