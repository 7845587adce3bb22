"""Which values a single field may have."""

from __future__ import annotations

import math

from ml_collections import ConfigDict

from stablelm_jax.config.access import flatten, get, refuse

# What kernels/attention.py and kernels/cross_entropy.py have, without jax here.
ATTENTION = ("auto", "reference", "chunked", "pallas_gpu", "pallas_tpu", "splash")
CROSS_ENTROPY = ("auto", "reference", "saved", "tiled")
_CHOICES = {
    "schedule.kind": ("hybrid", "cosine"),
    "training.dtype": ("bfloat16", "float32"),
    "training.remat": ("none", "dots", "attention", "full"),
    "training.attention": ATTENTION,
    "training.cross_entropy": CROSS_ENTROPY,
    "guard.kind": ("off", "skip", "stop"),
}
# key -> (least, most), both allowed
_RANGES = {
    "seed": (0, 2**32 - 1),
    "data.sequence_length": (1, math.inf),
    "data.batch_size": (1, math.inf),
    "data.prefetch_batches": (0, math.inf),
    "data.cache_gb": (0, math.inf),
    "optimizer.weight_decay": (0, math.inf),
    "schedule.minimum": (0, math.inf),
    "schedule.warmup_steps": (0, math.inf),
    "schedule.total_steps": (1, math.inf),
    "schedule.cooldown_start": (0, math.inf),
    "schedule.cooldown_steps": (1, math.inf),
    "schedule.cooldown_learning_rate": (0, math.inf),
    "schedule.cooldown_end": (0, math.inf),
    "training.num_steps": (1, math.inf),
    "training.accumulation": (1, math.inf),
    "training.unroll": (1, math.inf),
    "training.log_every": (1, math.inf),
    "training.stop_after_skipped": (1, math.inf),
    "training.hang_seconds": (0, math.inf),
    "training.check_replicas_every": (0, math.inf),
    "guard.window": (2, math.inf),
    "parallel.model": (1, math.inf),
    "parallel.replica": (1, math.inf),
    "checkpoint.every": (1, math.inf),
    "checkpoint.every_minutes": (0, math.inf),
    "checkpoint.timeout_seconds": (1, math.inf),
    "checkpoint.keep_latest": (1, math.inf),
    "checkpoint.keep_every": (1, math.inf),
    "evaluation.every": (0, math.inf),
    "evaluation.max_rows": (1, math.inf),
    "evaluation.tasks_every": (0, math.inf),
    "evaluation.tasks_limit": (0, math.inf),
    "samples.every": (0, math.inf),
    "samples.max_new_tokens": (1, math.inf),
    "samples.temperature": (0, math.inf),
    "samples.top_p": (0, 1),
}
# the least value itself is not allowed, nor the most
_OPEN_RANGES = {
    "optimizer.b1": (-1e-9, 1),
    "optimizer.b2": (-1e-9, 1),
    "optimizer.epsilon": (0, math.inf),
    "optimizer.clip_norm": (0, math.inf),
    "schedule.peak": (0, math.inf),
    "guard.sigmas": (0, math.inf),
    "schedule.transition": (0, 0.5),
}


def check_ranges(config: ConfigDict) -> None:
    for key, value in flatten(config):
        if isinstance(value, float) and not math.isfinite(value):
            refuse(config, key, "is not a finite number", "give one")
    for key, choices in _CHOICES.items():
        if get(config, key) not in choices:
            refuse(config, key, "is not known", f"use one of: {', '.join(choices)}")
    for key, (least, most) in _RANGES.items():
        value = get(config, key)
        if value is not None and not least <= value <= most:
            refuse(config, key, "is out of range", f"use {_interval(least, most)}")
    for key, (least, most) in _OPEN_RANGES.items():
        if not least < get(config, key) < most:
            refuse(config, key, "is out of range", f"use a number {_open_interval(least, most)}")


def _interval(least: float, most: float) -> str:
    return f"{least} or more" if most == math.inf else f"{least} to {most}"


def _open_interval(least: float, most: float) -> str:
    lower = "0 or more" if least < 0 else f"above {least}"
    return lower if most == math.inf else f"{lower} and below {most}"
