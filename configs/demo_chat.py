"""The multilingual demo's model tuned for chat: SFT, then DPO, then self-knowledge.

    bash launch/demo_chat.sh  # fetches, prepares, trains all stages, evaluates
    python -m stablelm_jax.train --config configs/demo_chat.py:sft --workdir runs/demo_chat/sft

:sft and :random take the weights of configs/demo_multilingual.py. :random is an SFT, too, on
answers in languages drawn at random, so that DPO has something to teach; :dpo goes on from it, and
:self_knowledge from there.
SmolLM2's public recipe for 135 and 360 M parameters (huggingface/alignment-handbook,
recipes/smollm2) is what the numbers are compared with: SFT 1e-3, cosine, warmup 0.1, 2 epochs; DPO
1e-6, beta 0.5, 2 epochs.
"""

from pathlib import Path

from stablelm_jax.config import load

LANGUAGES = ("en", "de", "es", "fr", "it", "nl", "pt")  # Stable LM 2's seven (model card)


def get_config(stage="sft"):
    stages = {"sft": _sft, "random": _random, "dpo": _dpo, "self_knowledge": _self_knowledge}
    if stage not in stages:
        raise ValueError(f"{stage!r}: write one of {', '.join(stages)} after the colon")
    config = load(Path(__file__).with_name("demo_multilingual.py"))
    config.name = f"demo_chat_{stage}"
    config.branch.state = "weights"
    config.data.packing = "best_fit"
    config.schedule.kind = "cosine"
    config.schedule.minimum = 0.0  # a cosine to zero, as SmolLM2's
    config.checkpoint.every = 100  # ours, as the next three: a few of each
    config.evaluation.every = 100
    config.evaluation.max_rows = 64
    config.samples.every = 0  # prompts without a template show nothing of a chat model
    stages[stage](config)
    config.schedule.total_steps = config.training.num_steps
    config.schedule.warmup_steps = config.training.num_steps // 10  # SmolLM2: 0.1
    return config


def _sft(config, kind="howto", steps=300):
    config.branch.parent = "runs/demo"  # as configs/demo_multilingual.py names it
    config.training.objective = "sft"
    config.data.weights = {f"{kind}_{language}": 1.0 for language in LANGUAGES}
    config.schedule.peak = 1e-3  # SmolLM2
    config.training.num_steps = steps  # ours: about 2 epochs of `howto`


def _random(config):
    _sft(config, kind="random", steps=150)  # ours: enough to answer, in any language


def _dpo(config):
    config.branch.parent = "runs/demo_chat/random"
    config.training.objective = "dpo"
    config.data.weights = {f"pairs_{language}": 1.0 for language in LANGUAGES}
    config.dpo.beta = 0.5  # SmolLM2
    config.schedule.peak = 1e-4  # ours: SmolLM2's 1e-6 moves so small a model too little
    config.training.num_steps = 200  # ours


def _self_knowledge(config):
    config.branch.parent = "runs/demo_chat/dpo"
    config.training.objective = "sft"
    config.data.packing = "one"  # as the 1.6B's
    config.data.weights = {"self_knowledge": 1.0}
    config.schedule.peak = 1e-4  # ours
    config.training.num_steps = 100  # ours
