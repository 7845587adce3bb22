"""The programs of a run, compiled before its loop: there a signal must not meet a compilation."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from stablelm_jax import config as config_lib
from stablelm_jax.kernels.attention import choose
from stablelm_jax.kernels.check import check_attention, check_norms
from stablelm_jax.kernels.norms import Kind
from stablelm_jax.optimizer.schedule import make_schedule
from stablelm_jax.parallel import distributed, sharding
from stablelm_jax.run.compilation import CompilationCache
from stablelm_jax.training.held_out import EvalStep
from stablelm_jax.training.layer_norms import LayerNorms, make_layer_norms
from stablelm_jax.training.objectives import make_objective
from stablelm_jax.training.setup import Run, compute_of, lora_of, optimizer_and_state
from stablelm_jax.training.state import TrainState, shardings_of
from stablelm_jax.training.step import StepFunction, make_train_step

# What both sides of a preference pair take at least, on average, where no data says it.
TOKENS_OF_A_PAIR = 64


@dataclasses.dataclass(frozen=True)
class Programs:
    """What the loop calls; None where nothing asks for it."""

    step: StepFunction
    # All weights, placed as `TrainState.base`, for samples and tasks: adapters are added to them.
    weights: Callable[[TrainState], Any]
    eval_step: EvalStep | None  # of the weights that `Run.joined` gives
    samples: Callable[[Any], dict[str, str]] | None  # f(weights) -> {prompt: continuation}
    layer_norms: LayerNorms | None


def compile_programs(
    run: Run, console: Console, cache: CompilationCache, first: int = 0
) -> Programs:
    """Tries the kernels out, compiles what steps from `first` on need, says how long that took.

    Raises WrongKernel, or a MeetingError where one fails on one host of several.
    """
    with distributed.together_or_not(Exception):  # else the others would wait for this host
        console.print(try_attention(run) + try_norms(run), soft_wrap=True)
    began = time.monotonic()
    with console.status("compiling the train step"):
        step = compile_steps(run, first)
    console.print(f"the train step was ready after {time.monotonic() - began:.1f} s; {cache}")
    eval_step = None
    if run.config.evaluation.every or run.reference is not None:
        console.print("compiling the evaluation")
        eval_step = compile_eval_step(run)
    samples = _prepare_samples(run) if run.config.samples.every else None
    layer_norms = None
    if run.config.training.layer_norms_every:
        layer_norms = _by_shape(compile_layer_norms, run, first)
    return Programs(step, compile_weights(run), eval_step, samples, layer_norms)


def compile_weights(run: Run) -> Callable[[TrainState], Any]:
    """`Programs.weights`."""
    if run.lora is None:
        return lambda state: state.params
    frozen, adapters = run.abstract.frozen, run.abstract.params
    merge = jax.jit(run.lora.merge, out_shardings=shardings_of(frozen))
    merge = merge.lower(frozen, adapters).compile()
    return lambda state: merge(state.frozen, state.params)


def compile_steps(run: Run, first: int = 0) -> StepFunction:
    """The train step from step `first` on."""
    return _by_shape(compile_step, run, first)


def _by_shape(compile_one: Callable[[Run], Callable], run: Run, first: int) -> Callable:
    """f(state, batch), compiled for each shape that batches have from step `first` on."""
    stages = [config for _, config in config_lib.batch_stages(run.config, first)]
    configs = {(c.data.batch_size, c.data.sequence_length): c for c in stages}
    runs = {shape: dataclasses.replace(run, config=config) for shape, config in configs.items()}
    programs = {shape: compile_one(own) for shape, own in runs.items()}
    if len(programs) == 1:
        return next(iter(programs.values()))
    return lambda state, batch: programs[batch["tokens"].shape](state, batch)


def compile_step(run: Run) -> StepFunction:
    """The train step, compiled ahead for this run's shapes."""
    return lower_step(run.config, run.mesh, len(run.sources), run.num_pairs).compile()


def compile_eval_step(run: Run) -> EvalStep:
    """The evaluation, compiled ahead for this run's shapes."""
    batch = abstract_batch(run.config, run.mesh, run.num_pairs)
    return run.eval_step.lower(run.joined(run.abstract), batch).compile()


def compile_layer_norms(run: Run) -> LayerNorms:
    """The norms by layer, compiled ahead for this run's shapes."""
    layer_norms = make_layer_norms(
        run.model,
        run.mesh,
        optimizer=run.optimizer,
        objective=run.objective,
        accumulation=run.config.training.accumulation,
        **gradient_options(run.config),
    )
    batch = abstract_batch(run.config, run.mesh, run.num_pairs)
    return layer_norms.lower(run.abstract, batch).compile()


def lower_step(
    config: ConfigDict, mesh: Mesh, num_sources: int, num_pairs: int | None = None
) -> jax.stages.Lowered:
    """The train step of `config` for the devices of `mesh`, here or elsewhere, not yet compiled."""
    optimizer, abstract = optimizer_and_state(config, mesh)
    step = make_train_step(
        config_lib.model_config(config),
        optimizer,
        make_schedule(config.schedule),
        mesh,
        abstract,
        objective=make_objective(config, num_sources),
        accumulation=config.training.accumulation,
        guard={**config.guard, "stop_after": config.training.stop_after_skipped},
        **gradient_options(config),
    )
    return step.lower(abstract, abstract_batch(config, mesh, num_pairs))


def gradient_options(config: ConfigDict) -> dict[str, Any]:
    """What `make_gradient_function` takes from `config`, but for objective and accumulation."""
    options = {name: config.parallel[name] for name in ("zero1", "fsdp", "float32_reduce")}
    return options | {"compute": compute_of(config), "lora": lora_of(config)}


def abstract_batch(
    config: ConfigDict, mesh: Mesh, num_pairs: int | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a batch (data/batches.py) with their shardings; for DPO, `reference` too.

    `num_pairs`: P, the most preference pairs of a row; None where no data is there to tell.
    """
    place, length = sharding.batch_sharding(mesh), config.data.sequence_length

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.data.batch_size, *shape), dtype, sharding=place)

    by_token = ("tokens", "targets", "segment_ids", "positions")
    batch = {name: array(jnp.int32, length) for name in by_token}
    batch |= {"loss_mask": array(jnp.float32, length), "source_ids": array(jnp.int32)}
    if config.training.objective == "dpo":
        pairs = num_pairs or pairs_of_a_row(config)
        batch["pair_ids"] = array(jnp.int32, pairs)
        batch["reference"] = array(jnp.float32, pairs, 2)
    return batch


def pairs_of_a_row(config: ConfigDict) -> int | None:
    """P where no data is there to tell; None for objectives without pairs."""
    if config.training.objective != "dpo":
        return None
    return max(1, config.data.sequence_length // TOKENS_OF_A_PAIR)


def attention_for(config: ConfigDict, device: Any) -> tuple[str, str]:
    """The attention that `config` runs on a kind of device, and why, for a person."""
    if config.training.attention != "auto":
        return config.training.attention, "as the config says"
    sizes, dtype = config_lib.model_config(config), jnp.dtype(config.training.dtype)
    q, k = (
        jax.ShapeDtypeStruct((1, config.data.sequence_length, heads, sizes.head_size), dtype)
        for heads in (sizes.num_heads, sizes.num_kv_heads)
    )
    return choose(device, q, k)


def try_attention(run: Run) -> str:
    """Says which attention runs here and why; WrongKernel if it is not right on this device."""
    device, sizes = jax.local_devices()[0], run.model
    name, why = attention_for(run.config, device)
    if device.platform == "cpu":
        return f"attention: {name} ({why})"
    heads = sizes.num_heads, sizes.num_kv_heads, sizes.head_size
    error = check_attention(name, *heads, run.compute.dtype)
    return f"attention: {name} ({why}); tried out here, it errs {error:.2f} times the plain form"


def try_norms(run: Run) -> str:
    """The same of the layers' norms; '' where they are left to the compiler."""
    name, sizes = run.compute.norms, run.model
    if name == "xla":
        return ""
    kind = Kind(sizes.norm, sizes.norm_epsilon)
    error = check_norms(name, sizes.width, sizes.block_norm_bias, kind, run.compute.dtype)
    return f"\nnorms: {name}; tried out here, they err {error:.2f} times the plain form"


def _prepare_samples(run: Run) -> Callable[[Any], dict[str, str]]:
    from stablelm_jax.generation.text import prepare_texts  # only runs that sample need it

    samples = run.config.samples
    sampling = {name: samples[name] for name in ("max_new_tokens", "temperature", "top_p")}
    sampling |= {"dtype": run.compute.dtype, "num_valid_ids": run.compute.num_valid_ids}
    sampling["seed"] = run.config.seed
    return prepare_texts(run.model, run.abstract.base, run.tokenizer, samples.prompts, **sampling)
