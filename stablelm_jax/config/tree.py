"""The config tree: every field with its default.

There is no plain `None`: a field that may stay unset, or that every run must set, is a
`placeholder` of its type, so that a flag can set it too.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def default_config() -> ConfigDict:
    """The whole tree, locked but for the names of sources."""
    config = ConfigDict(
        {
            "name": "run",  # shown in logs and by the writers
            "seed": 1234,  # of the initial weights and of the data order; 0 .. 2**32 - 1
            "model": _model_fields(),
            "data": _data_fields(),
            "optimizer": _optimizer_fields(),
            "schedule": _schedule_fields(),
            "training": _training_fields(),
            "parallel": _parallel_fields(),
            "checkpoint": _checkpoint_fields(),
            "evaluation": _evaluation_fields(),
            "samples": _sample_fields(),
            "writers": _writer_fields(),
            "guard": _guard_fields(),
            "branch": {"parent": ""},  # PATH/global_stepN that a new run starts from; '': none
            "profile": {"steps": ""},  # FIRST:LAST traces the updates first to last - 1; '': none
        }
    )
    return locked(config)


def _model_fields() -> dict[str, Any]:
    return {
        "vocab_size": placeholder(int),  # rows of the embedding, padding included
        "num_layers": placeholder(int),
        "width": placeholder(int),
        "num_heads": placeholder(int),  # query heads
        "num_kv_heads": placeholder(int),  # key and value heads; as num_heads: no grouping
        "feed_forward_width": placeholder(int),
        "rotary_fraction": 0.25,  # share of each head that is rotated
        "rotary_theta": 10_000.0,
        "norm_epsilon": 1e-5,
        "block_norm_bias": False,  # biases in the norms of the blocks
        "final_norm_bias": True,
        "qkv_bias": True,
        "qk_norm": False,  # LayerNorm of each query and key head
        "parallel_residual": False,  # attention and feed-forward side by side, one shared norm
        "init_std": 0.02,  # residual outputs: init_std / sqrt(2 * num_layers)
    }


def _data_fields() -> dict[str, Any]:
    return {
        "root": "data",  # folder, or its URL, of one folder a source, as `prepare` wrote them
        "cache": "~/.cache/stablelm_jax/shards",  # where shards behind a URL are kept on this host
        "cache_gb": 50.0,  # its bound in 10^9 bytes; shards past it are read by range; 0: all are
        "tokenizer": "arcade100k",  # or the path of a Hugging Face tokenizer.json
        "weights": {},  # source name -> weight; only their ratios matter; 0 leaves a source out
        "stages": "",  # later weights: 'STEP:a=0.7,b=0.3; STEP:b=1'
        "check_shards": True,  # on resuming, read shards whose time of change differs: same bytes?
        "sequence_length": 4096,  # tokens of a row
        "batch_size": placeholder(int),  # rows of the whole job in one step
        "loss_on_first_token": True,  # of a document, given the end of the one before it
        "prefetch_batches": 2,  # batches made ahead by a thread; 0: none
    }


def _optimizer_fields() -> dict[str, Any]:
    return {  # AdamW
        "b1": 0.9,
        "b2": 0.95,
        "epsilon": 1e-8,
        "weight_decay": 0.1,  # decoupled; not on norms and biases
        "clip_norm": 1.0,  # global norm of the gradient
    }


def _schedule_fields() -> dict[str, Any]:
    return {  # of the learning rate, see optimizer/schedule.py
        "kind": "hybrid",  # 'hybrid' (cosine, then inverse square root) | 'cosine'
        "peak": placeholder(float),
        "minimum": placeholder(float),  # 'hybrid': the cosine's floor, not the last learning rate
        "warmup_steps": placeholder(int),
        "total_steps": placeholder(int),  # N, the schedule's horizon; the run may end elsewhere
        "transition": 0.25,  # 'hybrid': the share of N after which the square root takes over
        "shift_warmup": False,  # count from the end of the warmup, as stock GPT-NeoX does
        "cooldown_start": placeholder(int),  # step where the linear cooldown begins; unset: none
        "cooldown_steps": placeholder(int),
        "cooldown_learning_rate": placeholder(float),  # at its start; unset: where the schedule is
        "cooldown_end": 0.0,  # learning rate at its end
    }


def _training_fields() -> dict[str, Any]:
    return {
        "num_steps": placeholder(int),  # the run ends here
        "accumulation": 1,  # microbatches a step
        "dtype": "bfloat16",  # of the matrix products: 'bfloat16' | 'float32'; weights stay float32
        "remat": "none",  # what backward computes again: 'none' | 'dots' | 'attention' | 'full'
        "unroll": 1,  # layers compiled one after the other in each turn of the loop over layers
        "attention": "auto",  # kernel, by its name in kernels/attention.py
        "cross_entropy": "auto",  # the head's loss, by its name in kernels/cross_entropy.py
        "num_valid_ids": placeholder(int),  # rows of the softmax; unset: all, padding too
        "deterministic": False,  # GPU: the same bits in every run, slower; CPU, TPU: always so
        "log_every": 10,  # steps between two lines of metrics
        "stop_after_skipped": 10,  # updates left out in a row, not finite or spikes
        "hang_seconds": 300.0,  # no step for so long, and 10 median steps: leave; 0: wait for ever
        "check_replicas_every": 0,  # steps; do replicas still hold the same bits? 0: never
    }


def _parallel_fields() -> dict[str, Any]:
    return {
        "data": -1,  # devices along the mesh axis `data`; -1: all that the other axes leave
        "model": 1,  # devices along the mesh axis `model`
        "replica": 1,  # groups of data x model devices; each holds all weights and moments
        "target": placeholder(str),  # the machine that the run is meant for, as `plan` names it
        "zero1": True,  # float32 weights and moments of the optimizer sharded over `data`
        "fsdp": False,  # no device holds whole weights: each layer is gathered where it is used
        "float32_reduce": True,  # gradients are summed over replicas in float32, not in `dtype`
    }


def _checkpoint_fields() -> dict[str, Any]:
    return {
        "every": 1000,  # steps; the last step is always saved
        "every_minutes": 0.0,  # temporary ones between them, by time; 0: none
        "asynchronous": True,  # files are written beside the training
        "timeout_seconds": 1800,  # a save that takes longer has failed
        "keep_latest": 3,
        "keep_every": placeholder(int),  # steps; these are kept for good; a multiple of `every`
        "save_initial": True,  # global_step0
    }


def _evaluation_fields() -> dict[str, Any]:
    return {
        "every": 1000,  # steps; 0: never
        "max_rows": 256,  # held-out rows a source
        "tasks": (),  # of lm-eval, or our groups in evaluation/tasks/; needs the extra `eval`
        "tasks_every": 0,  # steps between two evaluations on them; 0: never
        "tasks_limit": 500,  # items of each task, its first ones; 0: all
        "task_data": "",  # a folder made by launch/corpora/task_data.py; '': the Hugging Face Hub
    }


def _sample_fields() -> dict[str, Any]:
    return {
        "every": 1000,  # steps; 0: never
        "prompts": ("A short history of the bicycle:",),
        "max_new_tokens": 64,  # these three: the model card's example
        "temperature": 0.7,  # 0: the likeliest token
        "top_p": 0.95,
    }


def _guard_fields() -> dict[str, Any]:
    return {  # against spikes of the loss
        "kind": "off",  # 'off' | 'skip' the update | 'stop' the run
        "sigmas": 6.0,  # a spike is that many standard deviations above the running mean
        "window": 128,  # steps that mean and deviation look back, about; none is judged before
    }


def _writer_fields() -> dict[str, Any]:
    return {  # beside metrics.jsonl, which is always written
        "tensorboard": False,
        "wandb": False,
        "wandb_project": "stablelm_jax",
    }


def locked(config: ConfigDict) -> ConfigDict:
    config.lock()
    config.data.weights.unlock()
    return config
