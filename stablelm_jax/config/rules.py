"""The rules a config must keep; each error is one line: key, value, why, remedy."""

from __future__ import annotations

import math

from ml_collections import ConfigDict

from stablelm_jax.config.access import ConfigError, get, refuse, unknown_key
from stablelm_jax.config.derived import (
    batch_sizes,
    is_source_name,
    mixture_stages,
    model_config,
    profiled_steps,
    sequence_lengths,
    transition_step,
)
from stablelm_jax.config.tree import FIELDS, OPTIMIZERS, default_config, flatten

ARCADE100K_IDS = 100_289  # ids in use, without the padding rows


def validate(config: ConfigDict, *, data: bool = True) -> None:
    """Raises `ConfigError` at the first rule that `config` breaks; devices: see `validate_mesh`.

    `data`: whether data will be read. Where not, the tokenizer and the sources may be unset.
    """
    _fields(config, data)  # first: what comes after it relies on whole groups and right types
    model_config(config)  # raises where the sizes do not fit together
    _mixture(config, data)
    _tokenizer(config)
    _schedule(config)
    _cooldown(config)
    _mesh(config)
    _objective(config)
    _optimizer(config)
    _lora(config)
    _intervals(config)
    _ignored_options(config)


def _fields(config: ConfigDict, data: bool) -> None:
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
                refuse(config, key, problem)
        elif not field.optional and (data or key != "data.tokenizer"):
            why = "has no default" if isinstance(field.default, type) else "may not be unset"
            refuse(config, key, f"{why}; set it in the config file or with --config.{key}=VALUE")


def _mixture(config: ConfigDict, data: bool) -> None:
    weights = config.data.weights.to_dict()
    if not weights and data:
        remedy = (
            "name the prepared sources in the config file, as in config.data.weights.mine = 1.0, "
            "or start from --config configs/own_text.py:mine=1"
        )
        refuse(config, "data.weights", f"no source to train on; {remedy}")
    stages = mixture_stages(config)
    numbers = {"batch_stages": batch_sizes(config)[1:], "sequence_stages": _lengths(config)}
    for key, later in ({"stages": stages} | numbers).items():
        steps, least = [step for step, _ in later], 0 if key == "sequence_stages" else 1
        if steps != sorted(set(steps)) or min(steps, default=least) < least:
            why = f"the steps at which stages begin must rise, from {least} on"
            refuse(config, f"data.{key}", f"{why}; put them in order, each once")
    for step, stage in [(0, weights), *stages]:
        key = "data.stages" if step else "data.weights"
        for source, weight in stage.items():
            if not is_source_name(source):
                refuse(config, key, f"{source!r}: use a-z, 0-9 and _, a letter first")
            if type(weight) not in (int, float) or not 0 <= weight < math.inf:
                why = f"the weight of {source}, {weight!r}, is no finite number or negative"
                refuse(config, key, f"{why}; give a weight of 0 or more")
        if stage and not any(stage.values()):
            refuse(config, key, f"from step {step} on all weights are 0; give one above 0")
    if config.data.skip:
        from stablelm_jax.data.skipping import parse_skip  # slow, as `is_source_name` is

        try:
            parse_skip(config.data.skip)
        except ValueError as error:
            refuse(config, "data.skip", str(error))


def _lengths(config: ConfigDict) -> list[tuple[int, int]]:
    """The stages of `data.sequence_stages`, checked but for their order."""
    _, *stages = sequence_lengths(config)
    length, packing = config.data.sequence_length, config.data.packing
    if wrong := [tokens for _, tokens in stages if length % tokens]:
        why = f"{wrong[0]} does not divide config.data.sequence_length={length}, which rows are of"
        refuse(config, "data.sequence_stages", f"{why}; use divisors of it, or longer rows")
    if stages and packing != "concatenate":
        why = f"config.data.packing={packing} keeps documents whole, which this cuts"
        refuse(config, "data.sequence_stages", f"{why}; use one of the two")
    return stages


def _tokenizer(config: ConfigDict) -> None:
    vocab_size, num_valid = config.model.vocab_size, config.training.num_valid_ids
    least = ARCADE100K_IDS if config.data.tokenizer == "arcade100k" else 1
    if num_valid is not None and not least <= num_valid <= vocab_size:
        why = f"the tokenizer and config.model.vocab_size={vocab_size} allow {least} to that"
        refuse(config, "training.num_valid_ids", f"{why}; use the number of the tokenizer's ids")
    if vocab_size < least:
        remedy = "use 100352 rows, or name another tokenizer.json in config.data.tokenizer"
        refuse(config, "model.vocab_size", f"arcade100k has {ARCADE100K_IDS} ids; {remedy}")


def _schedule(config: ConfigDict) -> None:
    schedule, num_steps = config.schedule, config.training.num_steps
    kind, total, warmup = schedule.kind, schedule.total_steps, schedule.warmup_steps
    if warmup >= num_steps:
        why = f"the run is over before the warmup, config.training.num_steps={num_steps}"
        remedy = f"use fewer warmup steps (here {num_steps // 10}) or a longer run"
        refuse(config, "schedule.warmup_steps", f"{why}; {remedy}")
    if kind == "inverse_sqrt" and not warmup:
        why = "the learning rate falls as the square root of warmup_steps / step"
        refuse(config, "schedule.warmup_steps", f"{why}; use 1 or more")
    if kind == "wsd" and schedule.cooldown_start is None:
        why = "is the decay of config.schedule.kind=wsd"
        remedy = "set it, or use kind=constant, from whose checkpoints branches can cool down"
        refuse(config, "schedule.cooldown_start", f"{why}; {remedy}")
    if kind not in ("hybrid", "cosine"):
        return
    for name in ("minimum", "total_steps"):
        if schedule[name] is None:
            problem = f"config.schedule.kind={kind} needs it; set it"
            refuse(config, f"schedule.{name}", problem)
    hybrid = kind == "hybrid"
    if schedule.minimum > schedule.peak or (hybrid and schedule.minimum == schedule.peak):
        why = f"is not below config.schedule.peak={schedule.peak}"
        refuse(config, "schedule.minimum", f"{why}; lower it")
    if hybrid and warmup > transition_step(config):
        why = f"the inverse square root begins at step {transition_step(config)}, in the warmup"
        remedy = "use fewer warmup steps, a larger schedule.total_steps or schedule.transition"
        refuse(config, "schedule.warmup_steps", f"{why}; {remedy}")
    if not hybrid and warmup >= total:
        why = f"is not below config.schedule.total_steps={total}"
        refuse(config, "schedule.warmup_steps", f"{why}; lower it")
    if not hybrid and num_steps > total:
        why = f"the cosine ends at config.schedule.total_steps={total}"
        remedy = f"set config.schedule.total_steps={num_steps} too"
        refuse(config, "training.num_steps", f"{why}; {remedy}")


def _cooldown(config: ConfigDict) -> None:
    schedule, num_steps = config.schedule, config.training.num_steps
    start, steps = schedule.cooldown_start, schedule.cooldown_steps
    if start is None:
        return
    if steps is None:
        why = f"the cooldown at config.schedule.cooldown_start={start} needs a length"
        refuse(config, "schedule.cooldown_steps", f"{why}; set it")
    hybrid = schedule.kind == "hybrid"
    earliest = transition_step(config) if hybrid else schedule.warmup_steps
    if start < earliest:
        phase = "cosine" if hybrid else "warmup"
        why = f"is before step {earliest}, where the schedule is still in its {phase}"
        refuse(config, "schedule.cooldown_start", f"{why}; use {earliest} or later")
    if not start < num_steps <= start + steps:
        why = f"the cooldown is steps {start} to {start + steps}, the run must end in it"
        remedy = f"use {start + steps} for the whole cooldown"
        refuse(config, "training.num_steps", f"{why}; {remedy}")


def _mesh(config: ConfigDict) -> None:
    parallel = config.parallel
    for key in ("num_heads", "num_kv_heads", "feed_forward_width", "vocab_size"):
        if config.model[key] % parallel.model:
            why = f"does not divide config.model.{key}={config.model[key]}"
            refuse(config, "parallel.model", f"{why}; use a divisor of it")
    # How many there will be is not known here: the batch must fit the fewest at least.
    validate_mesh(config, parallel.replica * max(parallel.data, 1) * parallel.model)
    if parallel.fsdp and not parallel.zero1:
        why = "config.parallel.zero1=False asks for whole weights on every device"
        refuse(config, "parallel.fsdp", f"{why}; leave one of the two at its default")
    if parallel.fsdp and config.training.remat == "none":
        why = "every layer that was gathered would be kept for the backward pass"
        remedy = "use dots, attention or full, or config.parallel.fsdp=False"
        refuse(config, "training.remat", f"{why}; {remedy}")


def _objective(config: ConfigDict) -> None:
    if config.training.objective == "dpo" and config.data.loss_on != "answers":
        why = "DPO compares answers, and a prompt is the same in both"
        refuse(config, "data.loss_on", f"{why}: leave it at 'answers'")


def _optimizer(config: ConfigDict) -> None:
    if config.optimizer.kind == "ademamix" and config.optimizer.ademamix_warmup_steps is None:
        why = "config.optimizer.kind=ademamix needs it, and the paper's is the whole run"
        refuse(
            config,
            "optimizer.ademamix_warmup_steps",
            f"{why}; set it to config.training.num_steps={config.training.num_steps}, or to 0",
        )


def _lora(config: ConfigDict) -> None:
    lora = config.lora
    if not lora.rank:
        return
    from stablelm_jax.model.lora import target_names  # loads jax

    model = model_config(config)
    names = target_names(model)
    unknown = [name for name in lora.targets if name not in names]
    if unknown or not lora.targets:
        why = f"{unknown[0]!r} is no matrix of a layer" if unknown else "names no matrix"
        example = "as in --config.lora.targets=\"('query','value')\""
        refuse(config, "lora.targets", f"{why}; use some of {', '.join(names)}, {example}")
    narrowest = min(model.width, model.feed_forward_width, model.num_kv_heads * model.head_size)
    if lora.rank > narrowest:
        why = f"is more than the {narrowest} columns of the narrowest matrix"
        refuse(config, "lora.rank", f"{why}; use 8 to 64, or 0 to train all weights")


def _intervals(config: ConfigDict) -> None:
    keep_every, every = config.checkpoint.keep_every, config.checkpoint.every
    if keep_every is not None and keep_every % every:
        why = f"steps are saved every config.checkpoint.every={every}"
        refuse(config, "checkpoint.keep_every", f"{why}; use a multiple of that")
    if config.evaluation.tasks_every and not config.evaluation.tasks:
        problem = "there is no task to evaluate on; name some in config.evaluation.tasks"
        refuse(config, "evaluation.tasks_every", problem)
    profiled_steps(config)


def _ignored_options(config: ConfigDict) -> None:
    """Options that another one switches off: nobody is to believe that they do something."""
    dpo = config.dpo
    ignored = {}  # key: what gives it a meaning
    if config.training.objective != "dpo":
        ignored |= {f"dpo.{name}": "config.training.objective=dpo" for name in dpo}
    elif dpo.loss == "ipo":  # which is normalised by length, and never smoothed
        names = ("label_smoothing", "length_normalised")
        ignored |= {f"dpo.{name}": "config.dpo.loss=sigmoid" for name in names}
    if not config.lora.rank:
        ignored |= dict.fromkeys(("lora.alpha", "lora.targets"), "config.lora.rank")
    kind = config.schedule.kind
    if kind != "hybrid":
        ignored["schedule.transition"] = "config.schedule.kind=hybrid"
    if kind not in ("hybrid", "cosine"):
        keys = (f"schedule.{name}" for name in ("minimum", "total_steps", "shift_warmup"))
        ignored |= dict.fromkeys(keys, "config.schedule.kind=hybrid or cosine")
    for name in config.optimizer:
        owner = name.split("_")[0]  # of 'muon_steps', 'lion_b1', ...
        if owner in OPTIMIZERS and owner != config.optimizer.kind:
            ignored[f"optimizer.{name}"] = f"config.optimizer.kind={owner}"
    if config.optimizer.kind == "lion":
        keys = (f"optimizer.{name}" for name in ("b1", "b2", "epsilon"))
        ignored |= dict.fromkeys(keys, "an optimizer.kind other than lion")
    if config.schedule.cooldown_start is None:
        names = ("steps", "kind", "learning_rate", "end")
        keys = (f"schedule.cooldown_{name}" for name in names)
        ignored |= dict.fromkeys(keys, "config.schedule.cooldown_start")
    if not config.branch.parent:
        ignored["branch.state"] = "config.branch.parent"
    defaults = default_config()
    for key, needed in ignored.items():
        if get(config, key) != get(defaults, key):
            unset = FIELDS[key].optional and f"unset it with --config.{key}=none"
            remedy = f"set that, or {unset or 'leave this at its default'}"
            refuse(config, key, f"does nothing without {needed}; {remedy}")


def validate_mesh(config: ConfigDict, num_devices: int) -> dict[str, int]:
    """Sizes of the mesh axes replica, data, model; ConfigError: they do not fit `num_devices`."""
    data, model, replica = config.parallel.data, config.parallel.model, config.parallel.replica
    for axis in ("model", "replica"):
        if num_devices % config.parallel[axis]:
            why = f"does not divide the {num_devices} devices found"
            refuse(config, f"parallel.{axis}", f"{why}; use a divisor of their number")
    rest = num_devices // (replica * model)
    if replica * (rest if data == -1 else data) * model != num_devices:
        why = f"times model={model} and replica={replica} is not the {num_devices} devices found"
        fits = replica * rest * model == num_devices
        remedy = f"use -1 or {rest}" if fits else "use other divisors"
        refuse(config, "parallel.data", f"{why}; {remedy}")
    microbatches = replica * rest * config.training.accumulation
    for step, rows in batch_sizes(config):
        if rows % microbatches:
            why = (
                f"{f'{rows} rows from step {step} on do' if step else 'does'} not divide into "
                f"config.training.accumulation={config.training.accumulation} "
                f"microbatches on {replica * rest} device(s) with rows of their own"
            )
            remedy = f"use a multiple of {microbatches}, fewer devices or another accumulation"
            refuse(config, "data.batch_stages" if step else "data.batch_size", f"{why}; {remedy}")
    return {"replica": replica, "data": rest, "model": model}
