"""What follows from a config."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Sequence

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
    form = "STEP:source=weight,source=weight; STEP:... as in 1000:web=0.7,code=0.3"
    return [(step, parse_weights(text)) for step, text in _stages(config, "stages", ".+", form)]


def batch_sizes(config: ConfigDict) -> list[tuple[int, int]]:
    """(step, rows): from which step on a batch has so many rows; the first from step 0."""
    form = "STEP:rows; STEP:rows as in 1000:512; 5000:1024"
    return [(0, config.data.batch_size), *_numbers(config, "batch_stages", form)]


def sequence_lengths(config: ConfigDict) -> list[tuple[int, int]]:
    """(step, tokens): from which step on rows are cut so short; the first from step 0."""
    form = "STEP:length; STEP:length as in 0:1024; 5000:4096"
    return [(0, config.data.sequence_length), *_numbers(config, "sequence_stages", form)]


def at_step(stages: Sequence[tuple[int, int]], step: int) -> int:
    """The value of `batch_sizes` or `sequence_lengths` at a step."""
    return [value for begin, value in stages if begin <= step][-1]


def _numbers(config: ConfigDict, key: str, form: str) -> list[tuple[int, int]]:
    stages = _stages(config, key, r"0*[1-9]\d*", form)
    return [(step, int(number)) for step, number in stages]


def _stages(config: ConfigDict, key: str, what: str, form: str) -> Iterator[tuple[int, str]]:
    """(step, text) of each stage in a field of `data`; `what`: a pattern that the text matches."""
    value = config.data[key]
    for part in value.split(";") if value.strip() else []:
        if not (found := re.fullmatch(rf"\s*(\d+)\s*:\s*({what})\s*", part)):
            problem = f"{part.strip()!r} is no stage; write {form}"
            raise ConfigError(f"config.data.{key}={value!r}: {problem}")
        yield int(found[1]), found[2]


def batch_stages(config: ConfigDict, first: int = 0) -> list[tuple[int, ConfigDict]]:
    """(step, config) from step `first` to the run's end, one for each shape that its batches have.

    A config that says `data.batch_size` and `data.sequence_length` for its own steps, as the
    program has them, and has no stages of these.
    """
    sizes, lengths, stages = batch_sizes(config), sequence_lengths(config), []
    changes = {step for step, _ in sizes + lengths if first < step < config.training.num_steps}
    for step in (first, *sorted(changes)):
        own, length = copy.deepcopy(config), at_step(lengths, step)
        own.data.batch_stages = own.data.sequence_stages = ""
        own.data.batch_size = at_step(sizes, step) * (config.data.sequence_length // length)
        own.data.sequence_length = length
        stages.append((step, own))
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
    """Tokens of one of the first steps, all devices and microbatches together."""
    return config.data.batch_size * config.data.sequence_length


def largest_step(config: ConfigDict) -> ConfigDict:
    """Of `batch_stages` the one that needs the most memory."""
    stages = [own for _, own in batch_stages(config)]
    return max(stages, key=lambda own: (tokens_per_step(own), own.data.sequence_length))


def stage_tokens(config: ConfigDict) -> list[tuple[int, ConfigDict]]:
    """(tokens, config) of each of the whole run's `batch_stages`."""
    stages = batch_stages(config)
    ends = [step for step, _ in stages[1:]] + [config.training.num_steps]
    return [((end - step) * tokens_per_step(own), own) for (step, own), end in zip(stages, ends)]


def tokens_of_run(config: ConfigDict) -> int:
    """Tokens of all steps, from the first to `training.num_steps`."""
    return sum(tokens for tokens, _ in stage_tokens(config))


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
