"""The tables of `plan`."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from stablelm_jax import config as config_lib
from stablelm_jax import configs_folder
from stablelm_jax.data.manifest import ManifestMissing, read_manifest
from stablelm_jax.model.flops import flops_per_token, train_flops_per_token
from stablelm_jax.model.parameters import parameter_table
from stablelm_jax.parallel import sharding
from stablelm_jax.parallel.mesh import mesh_text
from stablelm_jax.planning.compile import CompiledStep, compile_for
from stablelm_jax.planning.cost import cost_of
from stablelm_jax.planning.targets import Target, parse_target
from stablelm_jax.storage.remote import as_path

_GIB = 2**30
_FLOAT32_BYTES = 4


def plan(
    config: ConfigDict,
    target: Target | None,
    *,
    mfu: float,
    watts: float | None,
    price: float | None,
) -> None:
    """Prints what a run of `config` needs.

    Raises:
      ConfigError, CompilerError, DoesNotFit: as `compile_for`; what needs no compiler is printed.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    sizes = config_lib.validate_mesh(config, _num_devices(config, target))
    console.print(_parameters(config, sizes))
    console.print(_flops(config))
    console.print(_tokens(config))
    console.print(_storage(config, target))
    if target is None:
        console.print("no --target: memory, communication, time and cost were left out")
        return
    console.print(_cost(config, target, mfu, watts, price))
    with console.status(f"compiling the train step for {target}"):
        step = compile_for(config, target)
    console.print(_memory(config, step))
    if step.collectives:
        console.print(_communication(step))


def plan_all() -> int:
    """Compiles every config of configs/launch; a table; 1 if one does not compile or fit."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = _table("launch configs, each compiled by its target's own compiler", "config")
    columns = (
        "target",
        "mesh",
        "rows",
        "remat",
        "attention",
        "mode",
        "peak GiB",
        "of",
        "sent a step",
        "seconds",
    )
    for column in columns:
        table.add_column(column, justify="right")
    failed = 0
    for path in sorted((configs_folder() / "launch").glob("*.py")):
        config = config_lib.load(path)
        console.print(f"compiling {path.stem} for {config.parallel.target}")
        try:
            step = compile_for(config, parse_target(config.parallel.target))
        except ValueError as error:
            failed += 1
            console.print(f"[red]{path.stem}: {error}[/red]", soft_wrap=True)
            continue
        table.add_row(path.stem, *_row(config, step))
    console.print(table)
    if failed:
        print(f"error: {failed} launch configs do not compile or do not fit", file=sys.stderr)
    return 1 if failed else 0


def _row(config: ConfigDict, step: CompiledStep) -> tuple[str, ...]:
    return (
        str(step.target),
        mesh_text(step.mesh, names=False),
        str(step.rows),
        config.training.remat,
        step.attention,
        _mode(config.parallel),
        f"{step.peak_bytes / _GIB:.1f}",
        f"{step.available_bytes / _GIB:.1f}",
        f"{sum(c.sent for c in step.collectives) / 1e9:.2f} GB",
        f"{step.seconds:.0f}",
    )


def _mode(parallel: Any) -> str:
    return "FSDP" if parallel.fsdp else "ZeRO-1" if parallel.zero1 else "whole"


def _table(title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    return table


def _num_devices(config: ConfigDict, target: Target | None) -> int:
    """Of the target; without one, the fewest that the config asks for."""
    if target:
        return target.num_devices
    parallel = config.parallel
    return parallel.replica * max(parallel.data, 1) * parallel.model


def _parameters(config: ConfigDict, sizes: Mapping[str, int]) -> Table:
    """Every parameter: where its float32 master lies, and the copy that is computed with."""
    rows = parameter_table(config_lib.model_config(config))
    parallel = config.parallel
    table = _table(f"parameters on a mesh of {mesh_text(sizes)}", "name")
    for column in ("shape", "count", "master split by", "copy split by", "MiB a device"):
        table.add_column(column, justify="right")
    total = held = 0.0
    for row in rows:
        copy = sharding.mesh_axes(row.axes)
        master = copy
        if parallel.zero1:
            master = sharding.zero_spec(copy, row.shape, sizes, stacked=row.stacked)
        parts = math.prod(sizes[axis] for axis in master if axis)
        size = row.count * _FLOAT32_BYTES / parts / 2**20
        total, held = total + row.count, held + size
        table.add_row(
            row.name,
            "x".join(map(str, row.shape)),
            f"{row.count:,}",
            _split(master, row.axes, sizes),
            _split(master if parallel.fsdp else copy, row.axes, sizes),
            f"{size:,.2f}",
        )
    table.add_section()
    table.add_row("all", "", f"{int(total):,}", _mode(parallel), "", f"{held:,.2f}")
    return table


def _split(spec: Any, axes: tuple[str, ...], sizes: Mapping[str, int]) -> str:
    split = [f"{axis} ({dim})" for axis, dim in zip(spec, axes) if axis and sizes[axis] > 1]
    return ", ".join(split) or "-"


def _flops(config: ConfigDict) -> Table:
    model, length = config_lib.model_config(config), config.data.sequence_length
    table = _table(f"training FLOPs a token, {length} tokens a row", "part")
    table.add_column("forward and backward, G", justify="right")
    table.add_column("share", justify="right")
    full = train_flops_per_token(model, length, causal=False)
    for part, forward in flops_per_token(model, length).items():
        table.add_row(part, f"{3 * forward / 1e9:,.3f}", f"{3 * forward / full:.1%}")
    table.add_section()
    causal = train_flops_per_token(model, length, causal=True)
    table.add_row("mfu counts (full attention)", f"{full / 1e9:,.3f}", "100.0%")
    table.add_row("mfu_causal counts", f"{causal / 1e9:,.3f}", f"{causal / full:.1%}")
    return table


def _tokens(config: ConfigDict) -> Table:
    weights = config_lib.mixture_weights(config)
    tokens = config.training.num_steps * config_lib.tokens_per_step(config)
    title = f"{tokens:,} tokens in {config.training.num_steps:,} steps"
    table = _table(title, "source")
    for column in ("weight", "tokens", "epochs"):
        table.add_column(column, justify="right")
    held = _prepared_tokens(config)
    for name, weight in weights.items():
        share = weight / sum(weights.values())
        epochs = f"{share * tokens / held[name]:.3g}" if name in held else "not prepared here"
        table.add_row(name, f"{share:.4f}", f"{share * tokens:,.0f}", epochs)
    return table


def _prepared_tokens(config: ConfigDict) -> dict[str, int]:
    found = {}
    for name in config_lib.mixture_weights(config):
        with contextlib.suppress(ManifestMissing):
            found[name] = read_manifest(as_path(config.data.root) / name).train.tokens
    return found


def _storage(config: ConfigDict, target: Target | None) -> Table:
    rows = parameter_table(config_lib.model_config(config))
    parameters = sum(row.count for row in rows)
    saved = 3 * _FLOAT32_BYTES * parameters
    table = _table("checkpoints", "what")
    table.add_column("GB", justify="right")
    table.add_row("a checkpoint: weights and two moments, float32", f"{saved / 1e9:,.1f}")
    table.add_row("its weights alone", f"{saved / 3 / 1e9:,.1f}")
    if target:
        per_host = saved / target.num_hosts
        table.add_row(
            f"host memory to save, each of {target.num_hosts} host(s)", f"{per_host / 1e9:,.2f}"
        )
    return table


def _cost(
    config: ConfigDict, target: Target, mfu: float, watts: float | None, price: float | None
) -> Table:
    model, length = config_lib.model_config(config), config.data.sequence_length
    tokens = config.training.num_steps * config_lib.tokens_per_step(config)
    power = target.facts.get("watts") if watts is None else watts
    cost = cost_of(
        tokens=tokens,
        flops_per_token=train_flops_per_token(model, length, causal=False),
        devices=target.num_devices,
        peak_tflops=target.facts["peak_tflops"],
        mfu=mfu,
        watts=power,
    )
    table = _table(f"the whole run on {target} at an MFU of {mfu:.1%} (full attention)", "what")
    table.add_column("", justify="right")
    table.add_row("tokens a second", f"{cost.tokens_per_second:,.0f}")
    table.add_row(
        "tokens a second of one device", f"{cost.tokens_per_second / target.num_devices:,.0f}"
    )
    long = cost.hours >= 72
    table.add_row(*("days", f"{cost.hours / 24:,.1f}") if long else ("hours", f"{cost.hours:,.1f}"))
    table.add_row("device-hours", f"{cost.device_hours:,.0f}")
    if price is not None:
        table.add_row(f"dollars, at {price:g} a device-hour", f"{cost.device_hours * price:,.0f}")
    if cost.megawatt_hours is None:
        table.add_row("energy", "give --watts: no figure for this chip")
        return table
    kind = "given" if watts is not None else "the data sheet's limit"
    table.add_row(
        f"energy at {power:g} W ({kind}), PUE 1.1", _amount(cost.megawatt_hours, "MWh", "kWh")
    )
    table.add_row("emissions at 0.385 kg CO2e a kWh", _amount(cost.tonnes_co2, "t", "kg"))
    return table


def _amount(value: float, unit: str, thousandth: str) -> str:
    return f"{value:,.1f} {unit}" if value >= 1 else f"{1000 * value:,.1f} {thousandth}"


def _memory(config: ConfigDict, step: CompiledStep) -> Table:
    table = _table(f"memory of a device of {step.target}, by its compiler", "what")
    table.add_column("GiB", justify="right")
    table.add_row(
        f"{step.rows} rows of {config.data.sequence_length} in each of "
        f"{config.training.accumulation} microbatches, remat {config.training.remat}, "
        f"attention {step.attention}",
        "",
    )
    table.add_row("weights, moments, batch", f"{step.argument_bytes / _GIB:.2f}")
    table.add_row("temporaries", f"{step.temporary_bytes / _GIB:.2f}")
    table.add_row("peak", f"{step.peak_bytes / _GIB:.2f}")
    table.add_row("available", f"{step.available_bytes / _GIB:.2f}")
    table.add_row(f"compiled in {step.seconds:.0f} s", "")
    return table


def _communication(step: CompiledStep) -> Table:
    table = _table("communication of one step, from the compiled program", "collective")
    for column in ("axis", "type", "devices", "times", "GB", "GB sent by a device"):
        table.add_column(column, justify="right")
    for found in step.collectives:
        table.add_row(
            found.kind,
            found.axis,
            found.dtype,
            str(found.devices),
            str(found.count),
            f"{found.size / 1e9:.4f}",
            f"{found.sent / 1e9:.4f}",
        )
    return table
