"""The tables of `plan`."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from rich.table import Table

from stablelm_jax import config as config_lib
from stablelm_jax import configs_folder
from stablelm_jax.data.manifest import ManifestMissing, read_manifest
from stablelm_jax.model.flops import flops_per_token, train_flops_per_token
from stablelm_jax.model.parameters import parameter_table
from stablelm_jax.optimizer.muon import newton_schulz_flops
from stablelm_jax.parallel import sharding
from stablelm_jax.parallel.mesh import make_mesh, mesh_text
from stablelm_jax.planning.compile import CompiledStep, DoesNotFit, compile_for
from stablelm_jax.planning.estimate import divided, head_passes, mode_text
from stablelm_jax.planning.targets import GIB, Target, parse_target
from stablelm_jax.run.console import make_console
from stablelm_jax.storage.remote import as_path
from stablelm_jax.training.setup import optimizer_and_state, trained_table
from stablelm_jax.training.state import stored_arrays

# The report's own assumptions for Stable LM 2 1.6B (arXiv 2402.17834, section on emissions).
POWER_USAGE_EFFECTIVENESS = 1.1
KG_CO2_PER_KWH = 0.385  # mean of the US grid

_FLOAT32_BYTES = 4


def plan(config: ConfigDict, target: Target | None, **assumed: float | None) -> None:
    """Prints what a run of `config` needs; `assumed`: mfu, watts and price, as of `run_cost`.

    Raises:
      ConfigError, CompilerError, DoesNotFit: as `compile_for`; what needs no compiler is printed.
    """
    console = make_console(file_width=120)
    parallel = config.parallel
    fewest_devices = parallel.replica * max(parallel.data, 1) * parallel.model
    sizes = config_lib.validate_mesh(config, target.num_devices if target else fewest_devices)
    for part in (_parameters(config, sizes), _flops(config), _tokens(config)):
        console.print(part)
    console.print(_checkpoints(config, target))
    if target is None:
        console.print("no --target: memory, communication, time and cost were left out")
        return
    console.print(run_cost(config, target, **assumed))
    with console.status(f"compiling the train step for {target}"):
        step = compile_for(config, target)
    console.print(_memory(config_lib.largest_step(config), step))
    if config.lora.rank:
        with console.status(f"compiling full tuning for {target}, to compare"):
            console.print(_full_tuning(config, target), soft_wrap=True)
    if step.collectives:
        console.print(_communication(step))


def plan_all() -> int:
    """Compiles every config of configs/launch; a table; 1 if one does not compile or fit."""
    console = make_console(file_width=160)
    rows, failed = [], 0
    for path in sorted((configs_folder() / "launch").glob("*.py")):
        config = config_lib.load(path)
        console.print(f"compiling {path.stem} for {config.parallel.target}")
        try:
            step = compile_for(config, parse_target(config.parallel.target))
        except ValueError as error:
            failed += 1
            console.print(f"{path.stem}: {error}", style="red", soft_wrap=True)
            continue
        mesh, mode = mesh_text(step.mesh, names=False), mode_text(config.parallel)
        memory = (f"{size / GIB:.1f}" for size in (step.peak_bytes, step.target.available_bytes))
        sent = f"{sum(c.sent for c in step.collectives) / 1e9:.2f} GB"
        how = (mesh, step.rows, config.training.remat, step.attention, mode)
        rows.append((path.stem, step.target, *how, *memory, sent, f"{step.seconds:.0f}"))
    columns = ("config", "target", "mesh", "rows", "remat", "attention", "mode")
    columns += ("peak GiB", "of", "sent a step", "seconds")
    title = "launch configs, each compiled by its target's own compiler"
    console.print(table(title, columns, rows))
    if failed:
        print(f"error: {failed} launch configs do not compile or do not fit", file=sys.stderr)
    return 1 if failed else 0


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """Names in the first column, numbers to the right in the others; an empty row is a line."""
    found = Table(title=title, title_justify="left")
    found.add_column(columns[0], no_wrap=True)
    for name in columns[1:]:
        found.add_column(name, justify="right")
    for row in rows:
        if row:
            found.add_row(*map(str, row))
        else:
            found.add_section()
    return found


def _parameters(config: ConfigDict, sizes: Mapping[str, int]) -> Table:
    """Every parameter: where its float32 master lies, and the copy that is computed with."""
    parallel, rows = config.parallel, []
    total, held = 0, 0.0

    def split(spec: Any, axes: tuple[str, ...]) -> str:
        parts = [f"{axis} ({dim})" for axis, dim in zip(spec, axes) if axis and sizes[axis] > 1]
        return ", ".join(parts) or "-"

    for row in trained_table(config):
        copy = sharding.mesh_axes(row.axes)
        master = sharding.master_spec(row, sizes, parallel.zero1)
        places = split(master, row.axes), split(master if parallel.fsdp else copy, row.axes)
        parts = math.prod(sizes[axis] for axis in master if axis)
        size = row.count * _FLOAT32_BYTES / parts / 2**20
        total, held = total + row.count, held + size
        shape = "x".join(map(str, row.shape))
        rows.append((row.name, shape, f"{row.count:,}", *places, f"{size:,.2f}"))
    if config.lora.rank:
        rows.append(_frozen_row(config, sizes))
    rows += [(), ("all", "", f"{total:,}", mode_text(parallel), "", f"{held:,.2f}")]
    columns = ("name", "shape", "count", "master split by", "copy split by", "MiB a device")
    return table(f"parameters on a mesh of {mesh_text(sizes)}", columns, rows)


def _frozen_row(config: ConfigDict, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The weights under adapters, which are counted apart: in the compute type."""
    table, size = parameter_table(config_lib.model_config(config)), 0.0
    for row in table:
        spec = sharding.master_spec(row, sizes, config.parallel.fsdp)
        size += row.count / math.prod(sizes[axis] for axis in spec if axis)
    size *= jnp.dtype(config.training.dtype).itemsize / 2**20
    count = f"{sum(row.count for row in table):,}"
    return (f"frozen, {config.training.dtype}", "", count, "-", "-", f"{size:,.2f}")


def _flops(config: ConfigDict) -> Table:
    model, length = config_lib.model_config(config), config.data.sequence_length
    full, causal = (train_flops_per_token(model, length, causal=c) for c in (False, True))
    parts = {name: 3 * forward for name, forward in flops_per_token(model, length).items()}
    parts |= _beside_mfu(config)
    parts |= {"mfu counts (full attention)": full, "mfu_causal counts": causal}
    rows = [(name, f"{flops / 1e9:,.3f}", f"{flops / full:.1%}") for name, flops in parts.items()]
    rows.insert(-2, ())
    title = f"training FLOPs a token, {length} tokens a row"
    return table(title, ("part", "forward and backward, G", "share"), rows)


def _beside_mfu(config: ConfigDict) -> dict[str, float]:
    """FLOPs a token that mfu leaves out, by what they are for."""
    parts = flops_per_token(config_lib.model_config(config), config.data.sequence_length)
    found = {"head once more, for the pairs' weights": (head_passes(config) - 1) * parts["head"]}
    if config.optimizer.kind == "muon":
        flops = newton_schulz_flops(trained_table(config), config.optimizer.muon_steps)
        found["Muon's orthogonal matrices, once a step"] = flops / config_lib.tokens_per_step(
            config
        )
    return {f"{name}; mfu leaves it out": flops for name, flops in found.items() if flops}


def _tokens(config: ConfigDict) -> Table:
    tokens = config_lib.tokens_of_run(config)
    weights, rows = config_lib.mixture_weights(config), []
    for name, weight in weights.items():
        share, epochs = weight / sum(weights.values()), "not prepared here"
        if prepared := _places(config, name):
            epochs = f"{share * tokens / prepared:.3g}"
        rows.append((name, f"{share:.4f}", f"{share * tokens:,.0f}", epochs))
    title = f"{tokens:,} tokens in {config.training.num_steps:,} steps"
    return table(title, ("source", "weight", "tokens", "epochs"), rows)


def _places(config: ConfigDict, name: str) -> int:
    """Tokens of an epoch of a source that lies here, filled places counted too; else 0.

    Of best fit, which leaves next to none of them empty, its tokens.
    """
    with contextlib.suppress(ManifestMissing):
        manifest = read_manifest(as_path(config.data.root) / name)
        items = manifest.train.documents // (2 if manifest.kind == "pairs" else 1)
        is_one = config.data.packing == "one"
        return items * config.data.sequence_length if is_one else manifest.train.tokens
    return 0


def _full_tuning(config: ConfigDict, target: Target) -> str:
    """What the same step needs where all weights are trained."""
    try:
        step = compile_for(divided(config, {"lora.rank": 0}), target)
    except DoesNotFit as error:
        return f"full tuning of the same step does not fit: {error}"
    peak, held = (f"{size / GIB:.2f} GiB" for size in (step.peak_bytes, step.argument_bytes))
    return f"full tuning of the same step: peak {peak}, of which weights, moments, batch {held}"


def _checkpoints(config: ConfigDict, target: Target | None) -> Table:
    state = optimizer_and_state(config, make_mesh(devices=jax.devices()[:1]))[1]
    saved, alone = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part))
        for part in (stored_arrays(state), state.params)
    )
    what, digits = ("adapters", 3) if config.lora.rank else ("weights", 1)
    rows = [
        (f"a checkpoint: {what}, state of the optimizer", f"{saved / 1e9:,.{digits}f}"),
        (f"its {what} alone", f"{alone / 1e9:,.{digits}f}"),
    ]
    if target:
        name = f"host memory to save, each of {target.num_hosts} host(s)"
        rows.append((name, f"{saved / target.num_hosts / 1e9:,.2f}"))
    return table("checkpoints", ("what", "GB"), rows)


def run_cost(
    config: ConfigDict, target: Target, mfu: float, watts: float | None, price: float | None
) -> Table:
    """Time, energy and emissions of a whole run; arguments as `run_hours` and `usage`."""
    speed, hours, reference = run_hours(config, target, mfu)
    rows = [
        ("tokens a second", f"{speed:,.0f}"),
        ("tokens a second of one device", f"{speed / target.num_devices:,.0f}"),
        ("days", f"{hours / 24:,.1f}") if hours >= 72 else ("hours", f"{hours:,.1f}"),
        *((name, f"{part:,.2f}") for name, part in reference.items()),
        *usage(hours * target.num_devices, target.facts, watts, price),
    ]
    title = f"the whole run on {target} at an MFU of {mfu:.1%} (full attention)"
    return table(title, ("what", ""), rows)


def run_hours(
    config: ConfigDict, target: Target, mfu: float
) -> tuple[float, float, dict[str, float]]:
    """Tokens a second and hours of a whole run, and what of these is the pass of DPO's reference.

    `mfu`: share of the peak that the model's FLOPs use, with full attention.
    """
    model, tokens = config_lib.model_config(config), config_lib.tokens_of_run(config)
    flops = 0.0  # of the whole run, then of a mean token
    for part, own in config_lib.stage_tokens(config):
        counted = train_flops_per_token(model, own.data.sequence_length, causal=False)
        flops += part * (counted + sum(_beside_mfu(own).values()))
    flops /= tokens
    rate = target.num_devices * target.peak_flops * mfu
    reference = _reference_hours(config, rate)
    return rate / flops, tokens * flops / rate / 3600 + sum(reference.values()), reference


def usage(
    device_hours: float,
    facts: Mapping[str, Any],
    watts: float | None = None,
    price: float | None = None,
) -> list[tuple[str, str]]:
    """What so many hours of a device with these `facts` use, for a person.

    Args:
      watts: mean power of one device with its share of the host, before cooling.
      price: dollars a device-hour.
    """
    rows = [("device-hours", f"{device_hours:,.0f}")]
    if price is not None:
        rows.append((f"dollars, at {price:g} a device-hour", f"{device_hours * price:,.0f}"))
    power = facts.get("watts") if watts is None else watts
    if power is None:
        return [*rows, ("energy", "give --watts: no figure for this chip")]
    kind = "the data sheet's limit" if watts is None else "given"
    kwh = device_hours * power * POWER_USAGE_EFFECTIVENESS / 1e3
    name = f"energy at {power:g} W ({kind}), PUE {POWER_USAGE_EFFECTIVENESS}"
    emissions = _amount(kwh * KG_CO2_PER_KWH, "kg", "t")
    return [
        *rows,
        (name, _amount(kwh, "kWh", "MWh")),
        (f"emissions at {KG_CO2_PER_KWH} kg CO2e a kWh", emissions),
    ]


def _reference_hours(config: ConfigDict, rate: float) -> dict[str, float]:
    """{what: hours} of DPO's forward pass over all pairs before its first step, at `rate` FLOP/s.

    Without prepared data, the run is taken as one epoch of them.
    """
    if config.training.objective != "dpo":
        return {}
    sources = config_lib.mixture_weights(config)
    prepared = sum(_places(config, name) for name in sources)
    tokens = prepared or config_lib.tokens_of_run(config)
    parts = flops_per_token(config_lib.model_config(config), config.data.sequence_length)
    name = (
        f"of these, the reference's pass over {'all pairs' if prepared else 'one epoch of pairs'}"
    )
    return {name: tokens * sum(parts.values()) / rate / 3600}


def _amount(value: float, unit: str, thousand: str) -> str:
    return f"{value:,.1f} {unit}" if value < 1000 else f"{value / 1000:,.1f} {thousand}"


def _memory(config: ConfigDict, step: CompiledStep) -> Table:
    training = config.training
    what = (
        f"{step.rows} rows of {config.data.sequence_length} in each of {training.accumulation} "
        f"microbatches, remat {training.remat}, attention {step.attention}"
    )
    if step.pairs:
        what += f", {step.pairs} pairs in a row at most"
    rows = [
        (what, ""),
        ("weights, moments, batch", f"{step.argument_bytes / GIB:.2f}"),
        ("temporaries, room reserved for them", f"{step.temporary_bytes / GIB:.2f}"),
        ("peak, in use at one moment", f"{step.peak_bytes / GIB:.2f}"),
        ("available", f"{step.target.available_bytes / GIB:.2f}"),
        (f"compiled in {step.seconds:.0f} s", ""),
    ]
    return table(f"memory of a device of {step.target}, by its compiler", ("what", "GiB"), rows)


def _communication(step: CompiledStep) -> Table:
    rows = [
        (c.kind, c.axis, c.dtype, c.devices, c.count, f"{c.size / 1e9:.4f}", f"{c.sent / 1e9:.4f}")
        for c in step.collectives
    ]
    columns = ("collective", "axis", "type", "devices", "times", "GB", "GB sent by a device")
    return table("communication of one step, from the compiled program", columns, rows)
