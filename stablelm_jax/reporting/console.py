"""What a person sees of a run: the decisions at its start, evaluations, samples."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from stablelm_jax.data.position import DataPosition
from stablelm_jax.model.flops import train_flops_per_token
from stablelm_jax.model.parameters import count_parameters, format_parameter_table, parameter_table
from stablelm_jax.parallel import sharding
from stablelm_jax.parallel.mesh import mesh_text
from stablelm_jax.storage.remote import is_url
from stablelm_jax.training.setup import Run


def show_decisions(console: Console, run: Run) -> None:
    """The parameter table, and what was decided for model, devices, data and schedule."""
    text = format_parameter_table(parameter_table(run.model))
    console.print(text, highlight=False, soft_wrap=True)
    table = Table("decision", "value", title=f"run {run.config.name}", title_justify="left")
    for name, value in _decisions(run).items():
        table.add_row(name, value)
    console.print(table)
    console.print(_source_table(run))
    if run.packed is not None:
        console.print(_packed_table(run))


def _decisions(run: Run) -> dict[str, str]:
    config, spec = run.config, run.spec
    parts = sharding.batch_parts(run.mesh)
    length = spec.sequence_length
    full = train_flops_per_token(run.model, length, causal=False)
    causal = train_flops_per_token(run.model, length, causal=True)
    placement = "split over data (ZeRO-1)" if config.parallel.zero1 else "on every device"
    if config.parallel.fsdp:
        placement = "split over data, gathered a layer at a time (FSDP)"
    dpo = ", ".join(f"{name} {value}" for name, value in config.dpo.items())
    return {
        "objective": config.training.objective + (f": {dpo}" if run.reference else ""),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "mesh": mesh_text(run.mesh.shape),
        "rows": f"{spec.batch_size} of {length} tokens a step = "
        f"{spec.batch_size // parts // config.training.accumulation} a device in a microbatch "
        f"x {config.training.accumulation} microbatches x {parts}",
        "weights and moments": f"float32, {placement}",
        **_adapters(run),
        "compute": f"{config.training.dtype}, remat {config.training.remat}, "
        f"attention {config.training.attention}",
        "parameters": f"{sum(row.count for row in parameter_table(run.model)):,}",
        "training FLOPs a token": f"{full / 1e9:.4g} G (full attention), "
        f"{causal / 1e9:.4g} G (causal)",
        **({"rows later": config.data.batch_stages} if config.data.batch_stages else {}),
        **({"rows cut to": config.data.sequence_stages} if config.data.sequence_stages else {}),
        "tokens of the run": f"{run.first_row(config.training.num_steps) * length:,} "
        f"in {config.training.num_steps:,} steps",
        "learning rate": _learning_rate(config.schedule),
        **({"left out": ", ".join(config.data.skip)} if config.data.skip else {}),
        "tokenizer": f"{run.tokenizer.name}, sha256 {run.tokenizer.sha256[:12]}",
        "data": f"{config.data.root}, hash {run.identity()['data_hash'][:12]}{_cached(run)}",
    }


def _learning_rate(schedule: ConfigDict) -> str:
    text = f"{schedule.kind}: peak {schedule.peak:g}, warmup {schedule.warmup_steps:,}"
    if (total := schedule.total_steps) is not None:
        text += f", N {total:,}"
    if (start := schedule.cooldown_start) is not None:
        text += f", {schedule.cooldown_kind} cooldown of {schedule.cooldown_steps:,} from {start:,}"
    return text


def _adapters(run: Run) -> dict[str, str]:
    """What a LoRA run trains in the place of the weights."""
    if run.lora is None:
        return {}
    count = sum(row.count for row in run.lora.table(run.model))
    where = f"rank {run.lora.rank}, alpha {run.lora.alpha:g}, on {', '.join(run.lora.targets)}"
    frozen = f"of {run.data_position.parent} (keep it), frozen in {run.config.training.dtype}"
    return {"trained": f"{count:,} parameters of adapters ({where}) {frozen}"}


def _cached(run: Run) -> str:
    """How shards behind a URL are read; nothing of local ones."""
    data = run.config.data
    if not is_url(data.root):
        return ""
    splits = [split for m in run.manifests.values() for split in (m.train, m.held_out)]
    total = sum(info.bytes for split in splits for info in split.shards)
    return (
        f"; of {total / 1e9:.3g} GB of shards up to {data.cache_gb:g} GB are kept whole in "
        f"{data.cache}, the others read by range"
    )


def _source_table(run: Run) -> Table:
    given, whole = (
        run.tokens_by_source(run.first_row(run.config.training.num_steps)),
        run.tokens_per_epoch,
    )
    spans = run.mixture.spans
    periods = " then ".join(f"{sum(counts.values()):,}" for _, counts in spans)
    later = [f"from row {row:,}" for row, _ in spans[1:]]
    columns = ("weight", *later, "tokens in it", "tokens of the run", "epochs", "unigram entropy")
    table = _sources(f"mixture, repeating every {periods} rows", columns)
    for name, manifest in run.manifests.items():
        table.add_row(
            name,
            *(f"{counts.get(name, 0)}/{sum(counts.values())}" for _, counts in spans),
            f"{manifest.train.tokens:,}",
            f"{given[name]:,}",
            f"{given[name] / whole[name]:.3g}",
            f"{manifest.unigram_entropy:.3f} nats",
        )
    return table


def _packed_table(run: Run) -> Table:
    """What packing made of each source, and how many steps read it so often."""
    steps = ("steps for 1 epoch", "for 2", "for 3")
    columns = ("items", "rows an epoch", "places filled", "tokens trained", *steps)
    stage = run.mixture.stages[-1]
    share = stage.counts / stage.period
    length = run.spec.sequence_length
    table = _sources(f"{run.spec.packing}: whole items in rows of {length} tokens", columns)
    every = [run.packed[name, "train"] for name in run.sources]
    groups = [(name, [rows], part) for name, rows, part in zip(run.sources, every, share)]
    for name, group, part in groups if len(groups) == 1 else [*groups, ("all", every, 1.0)]:
        rows = sum(map(len, group))
        places = sum(int(packed.lengths.sum(dtype="int64")) for packed in group)
        table.add_row(
            name,
            f"{sum(len(packed.lengths) for packed in group):,}",
            f"{rows:,}",
            f"{places / (rows * length):.2%}",
            f"{sum(packed.trained for packed in group):,}",
            *(f"{_steps(run, n * rows / part):,}" if part else "none" for n in (1, 2, 3)),
        )
    if len(groups) > 1:
        table.caption = "weights in proportion to the rows an epoch read all sources equally often"
    return table


def _steps(run: Run, rows: float) -> int:
    """How many steps of a run from its beginning read so many rows."""
    return bisect.bisect_left(
        range(2**40), rows, key=lambda step: DataPosition().first_row(step, run.batch_sizes)
    )


def _sources(title: str, columns: Iterable[str]) -> Table:
    """A table that will have a row for each source."""
    table = Table(title=title, title_justify="left")
    table.add_column("source", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def show_evaluation(console: Console, run: Run, step: int | str, line: Mapping[str, Any]) -> None:
    """Held-out loss of each source, with its standard error, beside its unigram entropy.

    `step`: of training, or the name of a file that was evaluated.
    """
    if run.objective.name == "dpo":
        return _show_preferences(console, run, step, line)
    columns = ("documents", "loss (nats)", "bits a byte", "unigram entropy", "loss below it by")
    most = run.config.evaluation.max_rows
    held = max(manifest.held_out.tokens for manifest in run.manifests.values())
    if run.packed is not None:
        held = run.spec.sequence_length * max(len(run.packed[n, "held_out"]) for n in run.sources)
    part = "all of it" if most * run.spec.sequence_length >= held else f"{most:,} rows a source"
    whose = f"of {step}" if isinstance(step, str) else f"after step {step:,}"
    table = _sources(f"held-out text {whose}: {part}", columns)
    for name, manifest in run.manifests.items():
        loss = line.get(f"eval/loss/{name}")
        if loss is None:
            table.add_row(name, "none")
            continue
        error, entropy = line.get(f"eval/loss_stderr/{name}"), manifest.unigram_entropy
        table.add_row(
            name,
            f"{line[f'eval/documents/{name}']:,}",
            f"{loss:.4f}" if error is None else f"{loss:.4f} ± {error:.4f}",
            f"{line[bits]:.4f}" if (bits := f"eval/bits_per_byte/{name}") in line else "",
            f"{entropy:.3f}",
            f"{entropy - loss:+.3f}",
        )
    console.print(table)


def _show_preferences(console: Console, run: Run, step: int, line: Mapping[str, Any]) -> None:
    """Of held-out pairs."""
    columns = ("loss", "chosen preferred", "margin", "reward of chosen", "of rejected")
    keys = ("loss", *(f"rewards/{part}" for part in ("accuracy", "margin", "chosen", "rejected")))
    table = _sources(f"held-out pairs after step {step:,}", columns)
    for name in run.sources:
        table.add_row(name, *(f"{line.get(f'eval/{key}/{name}', math.nan):.4f}" for key in keys))
    console.print(table)


def show_sample(console: Console, step: int, texts: Mapping[str, str], note: str) -> None:
    """The continuation of each prompt, above the line `note`."""
    shown = [Text.assemble((prompt, "bold"), text) for prompt, text in texts.items()]
    body, below = Text("\n\n").join(shown), Text(note)
    console.print(Panel(body, title=f"samples after step {step:,}", subtitle=below))


def reading_note(run: Run, rows: int) -> str:
    """How much the model has read after so many rows, for whoever reads its samples."""
    share = rows * run.spec.sequence_length / count_parameters(run.model)
    return f"{share:.2g} tokens read for each parameter"
