"""What follows from a config."""

from __future__ import annotations

import math
import re

from ml_collections import ConfigDict

from stablelm_jax.config.access import ConfigError
from stablelm_jax.model.config import ModelConfig


def model_config(config: ConfigDict) -> ModelConfig:
    """The model's own config; `ConfigError` where its sizes do not fit together."""
    try:
        return ModelConfig(**config.model.to_dict())
    except ValueError as error:
        raise ConfigError(f"config.{error}") from error


def mixture_weights(config: ConfigDict) -> dict[str, float]:
    """Source name -> weight as given (not normalised), sources of weight 0 left out, by name."""
    weights = config.data.weights.to_dict()
    return {source: float(weights[source]) for source in sorted(weights) if weights[source] > 0}


def mixture_stages(config: ConfigDict) -> list[tuple[int, dict[str, float]]]:
    """(step, weights) of each later stage that `data.stages` names; ConfigError if it cannot."""
    stages = []
    for part in config.data.stages.split(";") if config.data.stages.strip() else []:
        step, colon, weights = part.strip().partition(":")
        if not colon or not step.strip().isdecimal() or not weights.strip():
            raise ConfigError(
                f"config.data.stages={config.data.stages!r}: {part.strip()!r} is no stage; write "
                "STEP:source=weight,source=weight; STEP:... as in 1000:web=0.7,code=0.3"
            )
        stages.append((int(step), parse_weights(weights)))
    return stages


def is_source_name(name: str) -> bool:
    """Whether a source may have this name."""
    from stablelm_jax.data.manifest import SOURCE_NAME  # slow; until then no signal would be heard

    return bool(SOURCE_NAME.fullmatch(name))


def parse_weights(text: str) -> dict[str, float]:
    """`mine=0.7,other=0.3` -> {'mine': 0.7, 'other': 0.3}; a source without a weight has 1."""
    weights = {}
    for part in text.split(",") if text else []:
        source, equals, weight = part.partition("=")
        source = source.strip()
        try:
            if not is_source_name(source):
                raise ValueError("is no source name (a-z, 0-9, _)")
            if source in weights:
                raise ValueError("is named twice")
            weights[source] = float(weight) if equals else 1.0
        except ValueError as error:
            remedy = "write them as mine=0.7,other=0.3"
            raise ConfigError(f"weights {text!r}: {source!r}: {error}; {remedy}") from None
    return weights


def tokens_per_step(config: ConfigDict) -> int:
    """Tokens of one optimizer step, all devices and microbatches together."""
    return config.data.batch_size * config.data.sequence_length


def transition_step(config: ConfigDict) -> int:
    """First whole step at or after the change from cosine to inverse square root ('hybrid')."""
    schedule = config.schedule
    shift = schedule.warmup_steps if schedule.shift_warmup else 0
    return math.ceil(schedule.transition * schedule.total_steps) + shift


def profiled_steps(config: ConfigDict) -> range:
    """The steps that `profile.steps` names; empty for none. ConfigError if it names none."""
    text = config.profile.steps
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    steps = range(int(match[1]), int(match[2])) if match else range(0)
    if not steps:
        raise ConfigError(
            f"config.profile.steps={text!r}: is no span of steps; write FIRST:LAST, as in 10:13 "
            "for the three updates after step 10"
        )
    return steps
