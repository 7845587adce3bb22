"""From Stable LM 2 1.6B to its chat model, zephyr: SFT, then DPO, then self-knowledge.

    python -m stablelm_jax.train --config configs/zephyr_1_6b.py:sft --workdir runs/zephyr_1_6b/sft
    python -m stablelm_jax.train --config configs/zephyr_1_6b.py:dpo --workdir runs/zephyr_1_6b/dpo
    python -m stablelm_jax.train --config configs/zephyr_1_6b.py:self_knowledge \
        --workdir runs/zephyr_1_6b/self_knowledge

Each takes the weights of the one before it, :sft those of the base at models/stablelm_2_1_6b, as
`convert from-hf` makes it of the published model; another parent is --config.branch.parent=PATH.
Each source below is prepared like this, from where the comment beside it says (docs/chat.md has the
commands of all):

    python -m stablelm_jax.prepare --source slimorca_dedup --template zephyr --max-tokens 4096 \
        --input 'hf://datasets/Open-Orca/SlimOrca-Dedup/*.jsonl' --output data

Published: 8 nodes of 8 A100-80GB; MT-Bench 5.42, 49.89 on the Open LLM Leaderboard's six (card).
Time and memory: see `plan --config configs/zephyr_1_6b.py:sft --target a100-80gb:1x8`.

Sources of the numbers: "card" is the model card of stabilityai/stablelm-2-zephyr-1_6b, "report" the
technical report (arXiv 2402.17834), whose text on fine-tuning could not be read: every number of it
is marked NOT RE-VERIFIED. ("Memory3", Yang et al., arXiv 2407.01178, section 6, took over this SFT
and prints the same seven counts, 5e-5 with 10 % warmup, batch 512, 3 epochs and decay 0.1, and for
its DPO a cosine from 4e-6 and beta 0.01.) "handbook" is huggingface/alignment-handbook at commit
f0ffa0d (2024-01-10), recipes/zephyr-7b-beta/dpo/config_full.yaml, "SmolLM2" the same repository's
recipes/smollm2, the public recipe nearest to this size, for comparison.
"""

from pathlib import Path

from stablelm_jax.config import load

# Conversations of at most eight turns (Memory3: rounds) in each set; they add up to the reported
# 826,938. NOT RE-VERIFIED (report); the sets themselves are the card's.
SFT = {
    "ultrachat_200k": 194_409,  # HuggingFaceH4/ultrachat_200k, its files data/train_sft-*.parquet
    "wizardlm_evol_instruct": 80_662,  # WizardLM/WizardLM_evol_instruct_V2_196k
    "slimorca_dedup": 143_789,  # Open-Orca/SlimOrca-Dedup (Memory3); the card has SlimOrca
    "sharegpt": 3_509,  # openchat/openchat_sharegpt4_dataset, its file of GPT-4's answers
    "capybara": 7_291,  # LDJnr/Capybara
    "deita": 2_860,  # hkust-nlp/deita-10k-v0
    "metamathqa": 394_418,  # meta-math/MetaMathQA
}
# Pairs after leaving out ties, double texts and chosen answers rated below 8 of 10. NOT RE-VERIFIED
# (report). Two sources disagree on the first: allenai/ultrafeedback_binarized_cleaned (card) or
# argilla/ultrafeedback-binarized-preferences (report). The card's is taken. Prepared with
# --max-tokens 2048 a side has about the handbook's 1,024.
DPO = {
    "ultrafeedback": 63_169,  # data/train_prefs-*.parquet
    "orca_dpo_pairs": 12_859,  # Intel/orca_dpo_pairs
}
# Answers to 10,000 first messages that the base made up: by the chat model with facts about itself
# in earlier turns, and without. NOT RE-VERIFIED (report).
SELF_KNOWLEDGE = {"self_knowledge": 20_000}


def get_config(stage="sft"):
    stages = {"sft": _sft, "dpo": _dpo, "self_knowledge": _self_knowledge}
    if stage not in stages:
        raise ValueError(f"{stage!r}: write one of {', '.join(stages)} after the colon")
    config = load(Path(__file__).with_name("stablelm_2_1_6b.py"))
    config.name = f"zephyr_1_6b_{stage}"
    config.branch.state = "weights"
    config.schedule.kind = "cosine"
    config.schedule.minimum = 0.0  # a cosine to zero, as the handbook's; the report names no floor
    config.training.remat = "dots"  # ours: the memory is there
    config.training.accumulation = 1
    config.training.log_every = 1  # ours, as all that follows: a run of hours
    config.checkpoint.every = 50
    config.checkpoint.keep_every = None
    config.evaluation.every = 50
    config.samples.every = 0  # prompts without a template show nothing of a chat model
    stages[stage](config)
    config.schedule.total_steps = config.training.num_steps
    return config


def _sft(config):
    """SmolLM2: 2 epochs at 3e-4 (1.7B) or 1e-3 (135M, 360M), cosine, warmup 0.1, rows of 8,192."""
    config.branch.parent = "models/stablelm_2_1_6b"
    config.training.objective = "sft"
    # In proportion to conversations. A row holds more short ones than long ones: to read all sets
    # equally often, give each its rows of an epoch, which the run counts when it starts.
    config.data.weights = {name: float(count) for name, count in SFT.items()}
    config.data.packing = "best_fit"
    config.data.loss_on = "answers"  # ours: not reported; the handbook then trained on all tokens
    config.data.sequence_length = 4096  # report, NOT RE-VERIFIED: packed to 4,096
    config.data.batch_size = 512  # report, NOT RE-VERIFIED
    config.schedule.peak = 5e-5  # report, NOT RE-VERIFIED
    # Derived: 3 epochs (report, NOT RE-VERIFIED) of 826,938 conversations, 512 rows a step. How
    # many of them a row holds is not reported; 8 is ours, 512 tokens each: 605.7 steps. The run
    # says when it starts how many steps 3 epochs of the prepared sets have: the number to set.
    config.training.num_steps = 606
    config.schedule.warmup_steps = 61  # derived: a tenth of them (report, NOT RE-VERIFIED)
    config.training.accumulation = 16  # ours: 4 rows at a time on each of 8 devices


def _dpo(config):
    """SmolLM2: beta 0.5, 1e-6, 2 epochs (small ones) or 3, at most 1,024 tokens a side."""
    config.branch.parent = "runs/zephyr_1_6b/sft"
    config.training.objective = "dpo"
    config.dpo.beta = 0.01  # report, NOT RE-VERIFIED, and handbook
    config.dpo.loss = "sigmoid"  # handbook
    config.data.weights = {name: float(count) for name, count in DPO.items()}
    config.data.packing = "best_fit"
    config.data.sequence_length = 4096  # ours: a pair of the handbook's 1,024 a side fits twice
    # Derived: the handbook's 128 pairs a step (8 devices x 8 x 2), at 4 pairs a row. How many a row
    # holds follows from the data: the run says when it starts how many steps an epoch has.
    config.data.batch_size = 32
    config.training.num_steps = 594  # derived: 1 epoch (handbook) of 76,028 pairs, 128 a step
    # Two sources disagree: 4e-6 (report, NOT RE-VERIFIED), which calls it lowered, and 5e-7
    # (handbook), of which it is the eightfold. The report's is taken: it is what was done.
    config.schedule.peak = 4e-6
    config.schedule.warmup_steps = 59  # derived: the handbook's 0.1
    config.optimizer.b2 = 0.999  # handbook: AdamW as torch has it, without decay
    config.optimizer.weight_decay = 0.0


def _self_knowledge(config):
    """All numbers but the length of a row: report, NOT RE-VERIFIED."""
    config.branch.parent = "runs/zephyr_1_6b/dpo"
    config.training.objective = "sft"
    config.data.weights = {name: float(count) for name, count in SELF_KNOWLEDGE.items()}
    config.data.packing = "one"
    config.data.sequence_length = 2048  # ours: the card's answers have at most 1,024 tokens
    config.data.batch_size = 256
    config.schedule.peak = 3e-6
    config.schedule.warmup_steps = 100
    config.training.num_steps = 469  # derived: 6 epochs of 20,000 conversations, 256 a step
    config.training.accumulation = 4  # ours: 8 rows at a time on each of 8 devices
