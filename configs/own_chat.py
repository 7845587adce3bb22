"""Your own conversations, then your own preferences: configs/own_text.py's model made a chat model.

Five commands from the base to a file for llama.cpp:

    python -m stablelm_jax.prepare --source chats --input my_chats --output data \\
        --template zephyr --max-tokens 512
    python -m stablelm_jax.train --config configs/own_chat.py:sft:chats --workdir runs/sft
    python -m stablelm_jax.prepare --source pairs --input my_pairs --output data \\
        --template zephyr --max-tokens 512
    python -m stablelm_jax.train --config configs/own_chat.py:dpo:pairs --workdir runs/dpo
    python -m stablelm_jax.convert to-gguf runs/dpo chat.gguf

After the stage come the sources, with weights if there are several: `:sft:chats=0.7,other=0.3`. The
first stage takes the weights of runs/mine, the second those of runs/sft; other parents, imported
ones too, are named by --config.branch.parent, and have to be of this model's sizes. How the files
of conversations and pairs may look, and what the numbers of a run mean: docs/chat.md.
"""

from pathlib import Path

from stablelm_jax.config import load


def get_config(choice="sft"):
    stage, _, sources = choice.partition(":")
    if stage not in ("sft", "dpo"):
        raise ValueError(f"{choice!r}: write sft:SOURCE or dpo:SOURCE after the colon")
    config = load(f"{Path(__file__).with_name('own_text.py')}:{sources}")
    config.name = "own_chat"
    config.training.objective = stage
    config.branch.state = "weights"
    config.data.packing = "best_fit"
    config.data.sequence_length = 512  # ours: most conversations are longer than a row of own_text
    config.schedule.kind = "cosine"
    config.schedule.minimum = 0.0  # to zero, as SmolLM2's (huggingface/alignment-handbook)
    config.samples.every = 0  # prompts without a template show nothing of a chat model
    if stage == "sft":
        config.branch.parent = "runs/mine"  # as the README trains it
        config.schedule.peak = 1e-3  # SmolLM2's for 135 and 360 M parameters
    else:
        config.branch.parent = "runs/sft"
        config.dpo.beta = 0.5  # SmolLM2
        config.schedule.peak = 1e-5  # ours: between SmolLM2's 1e-6 and what so small a model needs
        config.training.num_steps = 100  # ours
        config.schedule.total_steps = 100
        config.schedule.warmup_steps = 10
    return config
