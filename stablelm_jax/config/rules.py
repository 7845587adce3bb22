"""The rules a config must keep; each error is one line: key, value, why, remedy."""

from __future__ import annotations

import math

from ml_collections import ConfigDict

from stablelm_jax.config.access import (
    SOURCE_NAME,
    ConfigError,
    field_type,
    flatten,
    get,
    refuse,
    unknown_key,
)
from stablelm_jax.config.derived import (
    mixture_stages,
    model_config,
    profiled_steps,
    transition_step,
)
from stablelm_jax.config.ranges import check_ranges
from stablelm_jax.config.tree import default_config


def validate(config: ConfigDict) -> None:
    """Raises `ConfigError` at the first rule that `config` breaks; devices: see `validate_mesh`."""
    _check_tree(config)
    _check_types(config)
    _check_texts(config)
    check_ranges(config)
    model_config(config)
    _check_weights(config)
    _check_stages(config)
    _check_tokenizer(config)
    _check_schedule(config)
    _check_cooldown(config)
    _check_batch(config)
    _check_sharding(config)
    _check_periods(config)
    profiled_steps(config)


def _check_tree(config: ConfigDict) -> None:
    """A file or a flag may have replaced a whole group: every field must still be there."""
    known = dict(flatten(default_config()))
    given = dict(flatten(config))
    for key in given:
        if key not in known and not key.startswith("data.weights"):
            raise unknown_key(key)
    for key in known:
        if key not in given and key != "data.weights":
            raise ConfigError(
                f"config.{key}: is missing; set fields one by one, as in --config.{key}=VALUE, "
                "and start a config file from stablelm_jax.config.default_config()"
            )


_OPTIONAL = (
    "schedule.cooldown_start",
    "schedule.cooldown_steps",
    "schedule.cooldown_learning_rate",
    "checkpoint.keep_every",
    "parallel.target",
    "training.num_valid_ids",
)


def _check_types(config: ConfigDict) -> None:
    defaults = default_config()
    for key, value in flatten(config):
        if key.startswith("data.weights"):
            continue
        if value is None:
            if key not in _OPTIONAL:
                remedy = f"set it in the config file or with --config.{key}=VALUE"
                refuse(config, key, "has no default", remedy)
            continue
        kind = field_type(defaults, key)
        number = kind is float and type(value) is int
        if type(value) is not kind and not number:
            why = f"is of type {type(value).__name__}"
            refuse(config, key, why, f"give a value of type {kind.__name__}")


def _check_texts(config: ConfigDict) -> None:
    for key in ("name", "data.root", "data.cache", "data.tokenizer", "writers.wandb_project"):
        if not get(config, key):
            refuse(config, key, "is empty", "name one")


def _check_weights(config: ConfigDict) -> None:
    weights = config.data.weights.to_dict()
    if not weights:
        raise ConfigError(
            "config.data.weights={}: no source to train on; name the prepared sources "
            "in the config file, as in config.data.weights.mine = 1.0, or start from "
            "--config configs/own_text.py:mine=1"
        )
    for source, weight in weights.items():
        key = f"data.weights.{source}"
        if not SOURCE_NAME.fullmatch(source):
            refuse(config, key, "is no source name", "use a-z, 0-9 and _, a letter first")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            refuse(config, key, "is not a number", "give a weight of 0 or more")
        if not 0 <= weight < math.inf:
            refuse(config, key, "is negative or not finite", "give a weight of 0 or more")
    if not any(weights.values()):
        refuse(
            config, "data.weights", "all weights are 0", "give at least one source a weight above 0"
        )


def _check_stages(config: ConfigDict) -> None:
    stages = mixture_stages(config)
    steps = [step for step, _ in stages]
    if steps != sorted(set(steps)) or 0 in steps:
        why = "the steps at which stages begin must rise, from 1 on"
        refuse(config, "data.stages", why, "put them in order, each once")
    for step, weights in stages:
        bad = [name for name, weight in weights.items() if not 0 <= weight < math.inf]
        if bad or not any(weights.values()):
            why = f"the stage at step {step} has {'a negative' if bad else 'no positive'} weight"
            refuse(config, "data.stages", why, "give weights of 0 or more, one of them above 0")


ARCADE100K_IDS = 100_289  # ids in use, without the padding rows


def _check_tokenizer(config: ConfigDict) -> None:
    vocab_size, num_valid = config.model.vocab_size, config.training.num_valid_ids
    least = ARCADE100K_IDS if config.data.tokenizer == "arcade100k" else 1
    if num_valid is not None and not least <= num_valid <= vocab_size:
        why = f"the tokenizer and config.model.vocab_size={vocab_size} allow {least} to that"
        refuse(config, "training.num_valid_ids", why, "use the number of the tokenizer's ids")
    if config.data.tokenizer == "arcade100k" and config.model.vocab_size < ARCADE100K_IDS:
        refuse(
            config,
            "model.vocab_size",
            f"arcade100k has {ARCADE100K_IDS} ids",
            "use 100352 rows, or name another tokenizer.json in config.data.tokenizer",
        )


def _check_schedule(config: ConfigDict) -> None:
    schedule, num_steps = config.schedule, config.training.num_steps
    hybrid = schedule.kind == "hybrid"
    if schedule.minimum > schedule.peak or (hybrid and schedule.minimum == schedule.peak):
        refuse(
            config,
            "schedule.minimum",
            f"is not below config.schedule.peak={schedule.peak}",
            "lower it",
        )
    if schedule.warmup_steps >= num_steps:
        refuse(
            config,
            "schedule.warmup_steps",
            f"the run is over before the warmup, config.training.num_steps={num_steps}",
            f"use fewer warmup steps (here {num_steps // 10}) or a longer run",
        )
    if hybrid and schedule.warmup_steps > transition_step(config):
        refuse(
            config,
            "schedule.warmup_steps",
            f"the inverse square root begins at step {transition_step(config)}, in the warmup",
            "use fewer warmup steps, a larger schedule.total_steps or schedule.transition",
        )
    if not hybrid and schedule.warmup_steps >= schedule.total_steps:
        refuse(
            config,
            "schedule.warmup_steps",
            f"is not below config.schedule.total_steps={schedule.total_steps}",
            "lower it",
        )
    if not hybrid and num_steps > schedule.total_steps:
        refuse(
            config,
            "training.num_steps",
            f"the cosine ends at config.schedule.total_steps={schedule.total_steps}",
            f"set config.schedule.total_steps={num_steps} too",
        )


_COOLDOWN = (
    "schedule.cooldown_steps",
    "schedule.cooldown_learning_rate",
    "schedule.cooldown_end",
)


def _check_cooldown(config: ConfigDict) -> None:
    schedule, num_steps = config.schedule, config.training.num_steps
    start, steps = schedule.cooldown_start, schedule.cooldown_steps
    if start is None:
        for key in _COOLDOWN:
            if get(config, key) not in (None, 0):
                refuse(
                    config,
                    key,
                    "a cooldown needs its first step",
                    "set config.schedule.cooldown_start",
                )
        return
    if steps is None:
        why = f"the cooldown at config.schedule.cooldown_start={start} needs a length"
        refuse(config, "schedule.cooldown_steps", why, "set it")
    earliest = transition_step(config) if schedule.kind == "hybrid" else schedule.warmup_steps
    if start < earliest:
        refuse(
            config,
            "schedule.cooldown_start",
            f"is before step {earliest}, where the schedule is still in its "
            f"{'cosine' if schedule.kind == 'hybrid' else 'warmup'}",
            f"use {earliest} or later",
        )
    if not start < num_steps <= start + steps:
        refuse(
            config,
            "training.num_steps",
            f"the cooldown is steps {start} to {start + steps}, the run must end in it",
            f"use {start + steps} for the whole cooldown",
        )


def _check_batch(config: ConfigDict) -> None:
    data, model, accumulation = (
        config.parallel.data,
        config.parallel.model,
        config.training.accumulation,
    )
    if data != -1 and data < 1:
        refuse(
            config,
            "parallel.data",
            "is no number of devices",
            "use -1 (all that the model axis leaves) or a number of devices",
        )
    batch_size = config.data.batch_size
    parts = accumulation * max(data, 1) * config.parallel.replica
    if batch_size % parts:
        refuse(
            config,
            "data.batch_size",
            f"does not divide into config.training.accumulation={accumulation} microbatches"
            f"{'' if parts == accumulation else f' on {parts // accumulation} devices'}",
            f"use a multiple of {parts}, or another accumulation",
        )
    for key in ("num_heads", "num_kv_heads", "feed_forward_width", "vocab_size"):
        if config.model[key] % model:
            refuse(
                config,
                "parallel.model",
                f"does not divide config.model.{key}={config.model[key]}",
                "use a divisor of it",
            )


def _check_sharding(config: ConfigDict) -> None:
    if not config.parallel.fsdp:
        return
    if not config.parallel.zero1:
        why = "config.parallel.zero1=False asks for whole weights on every device"
        refuse(config, "parallel.fsdp", why, "leave one of the two at its default")
    if config.training.remat == "none":
        why = "every layer that was gathered would be kept for the backward pass"
        refuse(
            config,
            "training.remat",
            why,
            "use dots, attention or full, or config.parallel.fsdp=False",
        )


def _check_periods(config: ConfigDict) -> None:
    keep_every, every = config.checkpoint.keep_every, config.checkpoint.every
    if keep_every is not None and keep_every % every:
        refuse(
            config,
            "checkpoint.keep_every",
            f"steps are saved every config.checkpoint.every={every}",
            "use a multiple of that",
        )
    _check_tasks(config)
    prompts = config.samples.prompts
    if not all(isinstance(prompt, str) and prompt for prompt in prompts):
        refuse(config, "samples.prompts", "an empty prompt or one that is no text", "give texts")
    if config.samples.top_p == 0:
        refuse(
            config,
            "samples.top_p",
            "leaves no token to choose",
            "use a number above 0, or samples.temperature=0 for the likeliest token",
        )


def _check_tasks(config: ConfigDict) -> None:
    tasks = config.evaluation.tasks
    if not all(isinstance(task, str) and task for task in tasks):
        refuse(config, "evaluation.tasks", "an empty name or one that is no text", "give names")
    if config.evaluation.tasks_every and not tasks:
        why = "there is no task to evaluate on"
        refuse(config, "evaluation.tasks_every", why, "name some in config.evaluation.tasks")


def validate_mesh(config: ConfigDict, num_devices: int) -> dict[str, int]:
    """Sizes of the mesh axes replica, data, model on `num_devices`.

    Raises:
      ConfigError: the config does not fit them.
    """
    data = config.parallel.data
    model, replica = config.parallel.model, config.parallel.replica
    for key in ("parallel.model", "parallel.replica"):
        if num_devices % get(config, key):
            refuse(
                config,
                key,
                f"does not divide the {num_devices} devices found",
                "use a divisor of their number",
            )
    rest = num_devices // (replica * model)
    if replica * (rest if data == -1 else data) * model != num_devices:
        others = "" if replica == 1 else f"config.parallel.replica={replica} and "
        refuse(
            config,
            "parallel.data",
            f"times {others}config.parallel.model={model} is not the number of "
            f"devices found, {num_devices}",
            f"use -1 or {rest}" if replica * rest * model == num_devices else "use other divisors",
        )
    parts = replica * rest * config.training.accumulation
    if config.data.batch_size % parts:
        refuse(
            config,
            "data.batch_size",
            f"does not divide into {replica * rest} devices with rows of their own x "
            f"config.training.accumulation={config.training.accumulation}",
            f"use a multiple of {parts}, fewer devices or another accumulation",
        )
    return {"replica": replica, "data": rest, "model": model}
