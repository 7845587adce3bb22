"""The rules a config must keep; each error is one line: key, value, why, remedy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from ml_collections import ConfigDict

from stablelm_jax.config.access import ConfigError, get, refuse, unknown_key
from stablelm_jax.config.derived import (
    is_source_name,
    mixture_stages,
    model_config,
    profiled_steps,
    transition_step,
)
from stablelm_jax.config.tree import FIELDS, flatten

ARCADE100K_IDS = 100_289  # ids in use, without the padding rows

# A rule yields (key, why, remedy) of what it refuses. The first one ends the validation, so what
# stands below a `yield` may rely on what is refused there.
Refusals = Iterator[tuple[str, str, str]]


def validate(config: ConfigDict, *, data: bool = True) -> None:
    """Raises `ConfigError` at the first rule that `config` breaks; devices: see `validate_mesh`.

    `data`: whether data will be read. Where not, the tokenizer and the sources may be unset.
    """
    rules = itertools.chain(
        _fields(config, data),
        _mixture(config, data),
        _tokenizer(config),
        _schedule(config),
        _cooldown(config),
        _mesh(config),
        _sharding(config),
        _saves_and_samples(config),
    )
    for key, why, remedy in rules:
        refuse(config, key, why, remedy)
    profiled_steps(config)


def _fields(config: ConfigDict, data: bool) -> Refusals:
    given = dict(flatten(config))
    for key in given:
        if key not in FIELDS and not key.startswith("data.weights"):
            raise unknown_key(key)
    for key, field in FIELDS.items():
        if key not in given:  # a file or a flag has replaced a whole group
            raise ConfigError(
                f"config.{key}: is missing; set fields one by one, as in --config.{key}=VALUE, "
                "and start a config file from stablelm_jax.config.default_config()"
            )
        if given[key] is not None:
            if problem := field.problem(given[key]):
                yield key, *problem
        elif not field.optional and (data or key != "data.tokenizer"):
            yield key, "has no default", f"set it in the config file or with --config.{key}=VALUE"
    model_config(config)  # raises where the sizes do not fit together


def _mixture(config: ConfigDict, data: bool) -> Refusals:
    weights = config.data.weights.to_dict()
    if not weights and data:
        remedy = (
            "name the prepared sources in the config file, as in config.data.weights.mine = 1.0, "
            "or start from --config configs/own_text.py:mine=1"
        )
        yield "data.weights", "no source to train on", remedy
    for source, weight in weights.items():
        key = f"data.weights.{source}"
        if not is_source_name(source):
            yield key, "is no source name", "use a-z, 0-9 and _, a letter first"
        if type(weight) not in (int, float) or not 0 <= weight < math.inf:
            yield key, "is no finite number or negative", "give a weight of 0 or more"
    if weights and not any(weights.values()):
        yield "data.weights", "all weights are 0", "give at least one source a weight above 0"
    stages = mixture_stages(config)
    steps = [step for step, _ in stages]
    if steps != sorted(set(steps)) or 0 in steps:
        why = "the steps at which stages begin must rise, from 1 on"
        yield "data.stages", why, "put them in order, each once"
    for step, weights in stages:
        bad = [name for name, weight in weights.items() if not 0 <= weight < math.inf]
        if bad or not any(weights.values()):
            why = f"the stage at step {step} has {'a negative' if bad else 'no positive'} weight"
            yield "data.stages", why, "give weights of 0 or more, one of them above 0"


def _tokenizer(config: ConfigDict) -> Refusals:
    vocab_size, num_valid = config.model.vocab_size, config.training.num_valid_ids
    least = ARCADE100K_IDS if config.data.tokenizer == "arcade100k" else 1
    if num_valid is not None and not least <= num_valid <= vocab_size:
        why = f"the tokenizer and config.model.vocab_size={vocab_size} allow {least} to that"
        yield "training.num_valid_ids", why, "use the number of the tokenizer's ids"
    if vocab_size < least:
        remedy = "use 100352 rows, or name another tokenizer.json in config.data.tokenizer"
        yield "model.vocab_size", f"arcade100k has {ARCADE100K_IDS} ids", remedy


def _schedule(config: ConfigDict) -> Refusals:
    schedule, num_steps = config.schedule, config.training.num_steps
    hybrid, total, warmup = schedule.kind == "hybrid", schedule.total_steps, schedule.warmup_steps
    if schedule.minimum > schedule.peak or (hybrid and schedule.minimum == schedule.peak):
        why = f"is not below config.schedule.peak={schedule.peak}"
        yield "schedule.minimum", why, "lower it"
    if warmup >= num_steps:
        why = f"the run is over before the warmup, config.training.num_steps={num_steps}"
        remedy = f"use fewer warmup steps (here {num_steps // 10}) or a longer run"
        yield "schedule.warmup_steps", why, remedy
    if hybrid and warmup > transition_step(config):
        why = f"the inverse square root begins at step {transition_step(config)}, in the warmup"
        remedy = "use fewer warmup steps, a larger schedule.total_steps or schedule.transition"
        yield "schedule.warmup_steps", why, remedy
    if not hybrid and warmup >= total:
        why = f"is not below config.schedule.total_steps={total}"
        yield "schedule.warmup_steps", why, "lower it"
    if not hybrid and num_steps > total:
        why = f"the cosine ends at config.schedule.total_steps={total}"
        yield "training.num_steps", why, f"set config.schedule.total_steps={num_steps} too"


def _cooldown(config: ConfigDict) -> Refusals:
    schedule, num_steps = config.schedule, config.training.num_steps
    start, steps = schedule.cooldown_start, schedule.cooldown_steps
    if start is None:
        for name in ("cooldown_steps", "cooldown_learning_rate", "cooldown_end"):
            if schedule[name]:
                why = "a cooldown needs its first step"
                yield f"schedule.{name}", why, "set config.schedule.cooldown_start"
        return
    if steps is None:
        why = f"the cooldown at config.schedule.cooldown_start={start} needs a length"
        yield "schedule.cooldown_steps", why, "set it"
    hybrid = schedule.kind == "hybrid"
    earliest = transition_step(config) if hybrid else schedule.warmup_steps
    if start < earliest:
        phase = "cosine" if hybrid else "warmup"
        why = f"is before step {earliest}, where the schedule is still in its {phase}"
        yield "schedule.cooldown_start", why, f"use {earliest} or later"
    if not start < num_steps <= start + steps:
        why = f"the cooldown is steps {start} to {start + steps}, the run must end in it"
        yield "training.num_steps", why, f"use {start + steps} for the whole cooldown"


def _mesh(config: ConfigDict) -> Refusals:
    parallel = config.parallel
    if parallel.data != -1 and parallel.data < 1:
        remedy = "use -1 (all that the model axis leaves) or a number of devices"
        yield "parallel.data", "is no number of devices", remedy
    for key in ("num_heads", "num_kv_heads", "feed_forward_width", "vocab_size"):
        if config.model[key] % parallel.model:
            why = f"does not divide config.model.{key}={config.model[key]}"
            yield "parallel.model", why, "use a divisor of it"
    # How many there will be is not known here: the batch must fit the fewest at least.
    validate_mesh(config, parallel.replica * max(parallel.data, 1) * parallel.model)


def _sharding(config: ConfigDict) -> Refusals:
    if config.parallel.fsdp and not config.parallel.zero1:
        why = "config.parallel.zero1=False asks for whole weights on every device"
        yield "parallel.fsdp", why, "leave one of the two at its default"
    if config.parallel.fsdp and config.training.remat == "none":
        why = "every layer that was gathered would be kept for the backward pass"
        remedy = "use dots, attention or full, or config.parallel.fsdp=False"
        yield "training.remat", why, remedy


def _saves_and_samples(config: ConfigDict) -> Refusals:
    keep_every, every = config.checkpoint.keep_every, config.checkpoint.every
    if keep_every is not None and keep_every % every:
        why = f"steps are saved every config.checkpoint.every={every}"
        yield "checkpoint.keep_every", why, "use a multiple of that"
    tasks, prompts = config.evaluation.tasks, config.samples.prompts
    if not all(isinstance(task, str) and task for task in tasks):
        yield "evaluation.tasks", "an empty name or one that is no text", "give names"
    if config.evaluation.tasks_every and not tasks:
        remedy = "name some in config.evaluation.tasks"
        yield "evaluation.tasks_every", "there is no task to evaluate on", remedy
    if not all(isinstance(prompt, str) and prompt for prompt in prompts):
        yield "samples.prompts", "an empty prompt or one that is no text", "give texts"
    if config.samples.top_p == 0:
        remedy = "use a number above 0, or samples.temperature=0 for the likeliest token"
        yield "samples.top_p", "leaves no token to choose", remedy


def validate_mesh(config: ConfigDict, num_devices: int) -> dict[str, int]:
    """Sizes of the mesh axes replica, data, model on `num_devices`.

    Raises:
      ConfigError: the config does not fit them.
    """
    data, model, replica = config.parallel.data, config.parallel.model, config.parallel.replica
    for key in ("parallel.model", "parallel.replica"):
        if num_devices % get(config, key):
            why = f"does not divide the {num_devices} devices found"
            refuse(config, key, why, "use a divisor of their number")
    rest = num_devices // (replica * model)
    if replica * (rest if data == -1 else data) * model != num_devices:
        why = f"times model={model} and replica={replica} is not the {num_devices} devices found"
        fits = replica * rest * model == num_devices
        refuse(config, "parallel.data", why, f"use -1 or {rest}" if fits else "use other divisors")
    accumulation = config.training.accumulation
    parts = replica * rest * accumulation
    if config.data.batch_size % parts:
        why = (
            f"does not divide into config.training.accumulation={accumulation} microbatches on "
            f"{replica * rest} device(s) with rows of their own"
        )
        remedy = f"use a multiple of {parts}, fewer devices or another accumulation"
        refuse(config, "data.batch_size", why, remedy)
    return {"replica": replica, "data": rest, "model": model}
