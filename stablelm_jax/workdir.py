"""What `--workdir` may name: a new folder, or that of a run."""

from __future__ import annotations

import os
from pathlib import Path

from stablelm_jax.checkpoint import names
from stablelm_jax.config.access import ConfigError
from stablelm_jax.storage.files import what_is
from stablelm_jax.storage.remote import is_url


def check_workdir(workdir: str | os.PathLike[str]) -> None:
    """Raises ConfigError for what is something else than the folder of a run; says for what."""
    if problem := _problem(str(workdir)):
        raise ConfigError(f"--workdir={workdir}: {problem}")


def _problem(workdir: str) -> str:
    another = "write another folder, such as runs/NAME"
    if not workdir.strip():
        return f"is empty; {another}"
    path = names.checkpoint_path(workdir)
    for place in dict.fromkeys((path, names.real_path(path))):
        for inside in (place, *place.parents):
            if names.checkpoint_step(inside.name.partition(".")[0]) is None:
                continue
            run = inside.parent.parent if inside.parent.name == "checkpoints" else "RUN"
            return (
                f"is a checkpoint, or in one; write --workdir {run} to go on with its run, or "
                f"{another[6:]}, with --config.branch.parent={inside} for a branch"
            )
        if place.name == "checkpoints" and (place.parent / "metrics.jsonl").exists():
            return f"is in a run; write --workdir {place.parent} to go on with that"
    if is_url(workdir):
        return ""
    there = next(p for p in (path, *path.parents) if what_is(p))
    if what_is(there) != "a folder":
        return f"{there} is {what_is(there)}; {another}"
    if names.finished_steps(path):
        return f"holds checkpoints itself, as an imported model does; {another}"
    what = "" if (path / "checkpoints").exists() else _content(Path(path))
    return f"is {what}; {another}" if what else ""


def _content(path: Path) -> str:
    file = path / "config.json"  # a run has one too, of another kind
    config = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    if any(path.glob("*.safetensors")) or '"model_type"' in config or '"architectures"' in config:
        return "a Hugging Face model"
    prepared = (path / "manifest.json").exists() or any(path.glob("*/manifest.json"))
    return "a folder of prepared data" if prepared else ""
