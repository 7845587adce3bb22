"""Bytes that a device sends in a step against devices, beside the least that it must send.

    python benchmarks/scaling.py                         # 1.6B, H100s, 2 to 512 devices
    python benchmarks/scaling.py --devices 8 64 --modes ZeRO-1 FSDP

No device is needed: each step is compiled by the target's own compiler (extra `aot`), and what is
sent is read from the compiled program. The least follows from the shapes
(stablelm_jax/planning/estimate.py says how). A device has one row in each of one microbatch;
with tensor parallelism two devices share two rows. Attention is the plain one, which compiles in a
fraction of the time: it sends nothing.

`plain` keeps whole float32 weights and moments on every device and sums gradients over all of them:
what ZeRO-1 and FSDP are measured against.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs; the compilers need no device

from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from stablelm_jax import config as config_lib
from stablelm_jax.planning.compile import CompiledStep, compile_for
from stablelm_jax.planning.estimate import divided, layout_of, least_sent
from stablelm_jax.planning.targets import parse_target

MODES = {
    "ZeRO-1": {},
    "FSDP": {"parallel.fsdp": True},
    "ZeRO-1, model 2": {"parallel.model": 2},
    "plain": {"parallel.zero1": False},
}
_COLOURS = {"ZeRO-1": "C0", "FSDP": "C1", "ZeRO-1, model 2": "C2", "plain": "0.4"}
_GPUS_OF_A_HOST = 8


@dataclasses.dataclass(frozen=True)
class Point:
    """A compiled step. `sent`, `least`: bytes of a device by mesh axis; `seconds`: to compile."""

    mode: str
    devices: int
    sent: dict[str, float]
    least: dict[str, float]
    seconds: float

    @property
    def ratio(self) -> float:
        return sum(self.sent.values()) / sum(self.least.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/stablelm_2_1_6b.py", help="whose model")
    parser.add_argument("--chip", default="h100", help="a GPU of planning/chips.json")
    parser.add_argument("--target", help="one machine, as in h100:64x8, in place of --chip")
    parser.add_argument("--devices", nargs="+", type=int, default=[2**i for i in range(1, 10)])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--attention", default="reference", help="kernel")
    parser.add_argument("--plot", default="docs/images/scaling.png", help="PNG to write; '': none")
    arguments = parser.parse_args()
    console = Console()
    config = config_lib.load(arguments.config)
    config.training.attention = arguments.attention
    points = []
    targets = [arguments.target] if arguments.target else _targets(arguments)
    for name in targets:
        for mode in _possible(arguments.modes, name):
            with console.status(f"compiling {mode} for {name}"):
                points.append(_measure(config, name, mode))
            console.print(_said(points[-1]))
    console.print(_table(config, points))
    if arguments.plot:
        draw(points, config.name, Path(arguments.plot))


def _targets(arguments: argparse.Namespace) -> list[str]:
    hosts = [(count, min(count, _GPUS_OF_A_HOST)) for count in arguments.devices]
    return [f"{arguments.chip}:{count // per_host}x{per_host}" for count, per_host in hosts]


def _possible(modes: list[str], target_name: str) -> Iterator[str]:
    """Without a second replica there is nothing to sum over `data`."""
    devices = parse_target(target_name).num_devices
    for mode in modes:
        if devices > MODES[mode].get("parallel.model", 1):
            yield mode


def _measure(config: ConfigDict, target_name: str, mode: str) -> Point:
    target = parse_target(target_name)
    config = divided(config, _settings(target.num_devices, mode))
    step = compile_for(config, target)
    least = least_sent(layout_of(config, target.num_devices))
    return Point(mode, target.num_devices, _sent(step), least, step.seconds)


def _settings(devices: int, mode: str) -> dict[str, Any]:
    return {
        "data.batch_size": devices,
        "training.accumulation": 1,
        "training.remat": "full",
        "parallel.data": -1,
        **MODES[mode],
    }


def _sent(step: CompiledStep) -> dict[str, float]:
    """By mesh axis; groups along several axes count to data."""
    sent = {"data": 0.0, "model": 0.0}
    for found in step.collectives:
        sent["model" if found.axis == "model" else "data"] += found.sent
    return sent


def _said(point: Point) -> str:
    return f"{point.mode} on {point.devices}: {point.ratio:.3f} of the least, {point.seconds:.0f} s"


def _table(config: ConfigDict, points: list[Point]) -> Table:
    title = f"GB sent by a device in a step of {config.name}, one row a device"
    table = Table(title=title, title_justify="left")
    for column in ("mode", "devices", "over data", "least", "over model", "least", "ratio"):
        table.add_column(column, justify="right")
    for point in sorted(points, key=lambda p: list(MODES).index(p.mode)):
        pairs = ((point.sent[axis], point.least[axis]) for axis in ("data", "model"))
        figures = (f"{size / 1e9:.3f}" for pair in pairs for size in pair)
        table.add_row(point.mode, str(point.devices), *figures, f"{point.ratio:.3f}")
    return table


def draw(points: list[Point], name: str, path: Path) -> None:
    """The table as a picture: what is sent, and the least as a line, for each mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for mode in dict.fromkeys(point.mode for point in points):
        chosen = [point for point in points if point.mode == mode]
        devices = [point.devices for point in chosen]
        colour = _COLOURS[mode]
        least = [sum(point.least.values()) / 1e9 for point in chosen]
        axes.plot(devices, least, color=colour, linewidth=1.5)
        sent = [sum(point.sent.values()) / 1e9 for point in chosen]
        axes.plot(devices, sent, "o", color=colour, markeredgecolor="black", label=mode)
    axes.plot([], [], color="black", linewidth=1.5, label="least, from the shapes")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({p.devices for p in points}), sorted({p.devices for p in points}))
    axes.set(xlabel="devices", ylabel="GB sent by a device in a step", ylim=(0, None))
    axes.set_title(f"{name}, one row a device: compiled programs (dots) and the least (lines)")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, format="png")
    pyplot.close(figure)


if __name__ == "__main__":
    main()
