"""The three conversions from beginning to end: told, written aside, checked, in place."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from stablelm_jax.checkpoint.names import checkpoint_name, checkpoint_step
from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.checkpoint.saving import Checkpoint, write_checkpoint
from stablelm_jax.interop import from_hf as reading
from stablelm_jax.interop import gguf_export, gguf_peer
from stablelm_jax.interop import to_hf as writing
from stablelm_jax.interop.gguf_tensors import FILE_TYPES, stored_tensors
from stablelm_jax.interop.hf_peer import peer, peer_logits
from stablelm_jax.interop.verify import LIMITS, check, compare, our_logits, prompt_ids
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import count_parameters
from stablelm_jax.parallel.mesh import make_mesh
from stablelm_jax.storage.files import new_result


def from_hf(
    source: Path,
    out: Path,
    *,
    step: int | None = None,
    tokenizer: str | None = None,
    verify: bool = True,
    force: bool = False,
    console: Console,
) -> str:
    """Writes the checkpoint `out`, or `out/global_step<step>`; returns what to tell last.

    Raises:
      ValueError: the source cannot be read, or what was read computes something else; nothing is
        written.
    """
    out = _branch_path(out, step)
    directory = reading.open_directory(source, tokenizer)
    model = directory.model
    size = _tell(console, source, model)
    for switch in directory.dropped:
        console.print(f"  {switch.replace('_', ' ')}es are zero throughout: left out")
    mesh = model_mesh(model)
    with new_result(out, force=force, source=source) as target:
        with _progress(console, "reading", 4 * size) as advance:
            params = reading.load_params(directory, mesh, advance)
        with console.status("writing"):
            run = reading.run_item(directory, checkpoint_step(out.name))
            write_checkpoint(target, Checkpoint(params, None, run))
            reading.write_tokenizer(directory.tokenizer, target)
        del params
        if verify:
            console.print(_verified_import(directory, target, mesh), soft_wrap=True)
    return f"{out} is whole: generate, evaluate and convert take it as --checkpoint"


def _verified_import(directory, target: Path, mesh) -> str:
    ids = prompt_ids(directory.tokenizer)
    own = SavedModel.open(target)
    params = own.load(mesh)
    ours_TV = our_logits(own.model, params, ids)
    del params
    difference = compare(ours_TV, peer_logits(directory.path, ids))
    return f"checked by {check(difference, LIMITS['float32'], peer())}"


def to_hf(
    checkpoint: str,
    out: Path,
    *,
    dtype: str,
    revision: str | None = None,
    max_file_bytes: int = writing.MAX_FILE_BYTES,
    tokenizer: str | None = None,
    verify: bool = True,
    force: bool = False,
    console: Console,
) -> str:
    """Writes the directory `out`; returns what to tell last.

    Raises:
      ValueError: the checkpoint cannot be read, or what was written computes something else;
        nothing is left.
    """
    own = SavedModel.open(checkpoint, tokenizer)
    size = _tell(console, own.path, own.model, f", to {dtype}")
    with new_result(out, force=force, source=Path(own.path)) as target:
        with _progress(console, "writing", 4 * size) as advance:
            writing.write_directory(
                own,
                target,
                dtype=dtype,
                max_file_bytes=max_file_bytes,
                revision=revision,
                on_tensor=advance,
            )
        if verify:
            with console.status("comparing every tensor"):
                writing.check_bits(own, target, dtype)
            console.print(_verified_export(own, target, dtype), soft_wrap=True)
    return f"{out} is whole: AutoModelForCausalLM.from_pretrained({str(out)!r}) loads it"


def _verified_export(own: SavedModel, target: Path, dtype: str) -> str:
    ids = prompt_ids(own.tokenizer)
    params = own.load(model_mesh(own.model))
    trained_TV = stored_TV = our_logits(own.model, params, ids)
    if dtype != "float32":
        stored_TV = our_logits(own.model, _rounded(params, dtype), ids)
    del params
    theirs_TV = peer_logits(target, ids)
    told = f"checked by {check(compare(stored_TV, theirs_TV), LIMITS['float32'], peer())}"
    if dtype == "float32":
        return told
    return f"{told}\n{check(compare(trained_TV, theirs_TV), LIMITS[dtype], f'{dtype} costs')}"


def _rounded(params: Any, dtype: str) -> Any:
    """The values that the type can hold, in float32; `params` is taken apart, to spare memory."""
    return {
        name: _rounded(params.pop(name), dtype)
        if isinstance(params[name], dict)
        else params.pop(name).astype(dtype).astype("float32")
        for name in list(params)
    }


def to_gguf(
    checkpoint: str,
    out: Path,
    *,
    file_type: str,
    tokenizer: str | None = None,
    verify: bool = True,
    force: bool = False,
    console: Console,
) -> str:
    """Writes the GGUF file `out`; returns what to tell last.

    Args:
      file_type: key of gguf_tensors.FILE_TYPES.

    Raises:
      ValueError: the checkpoint cannot be read, llama.cpp could not run its tokenizer, or what was
        written computes something else; nothing is left.
    """
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name the file to write, such as {out / 'model.gguf'}")
    own = SavedModel.open(checkpoint, tokenizer)
    size = _tell(console, own.path, own.model, f", to {file_type}")
    finer = [stored.name for stored in stored_tensors(own.model, file_type) if stored.fell_back]
    if finer:
        console.print(
            f"  {len(finer)} tensors, such as {finer[0]}, have rows that are no whole number of "
            f"{file_type} blocks: stored as f16",
            soft_wrap=True,
        )
    with new_result(out, force=force, source=Path(own.path)) as target:
        with _progress(console, "writing", 4 * size) as advance:
            gguf_export.write_file(own, target, file_type=file_type, on_tensor=advance)
        if verify:
            with console.status("comparing every tensor, then what they compute"):
                gguf_export.check_values(own, target, file_type)
                told = _verified_gguf(own, target, file_type)
            console.print(told, soft_wrap=True)
    return f"{out} is whole: llama-cli -m {out} runs it"


def _verified_gguf(own: SavedModel, target: Path, file_type: str) -> str:
    ids = prompt_ids(own.tokenizer)[: own.max_positions - 1]  # one more is made
    positions = gguf_peer.compared_positions(len(ids), own.model.vocab_size)
    ours_PV = gguf_peer.log_probabilities(own_logits(own, ids), positions)
    theirs_PV = gguf_peer.peer_log_probabilities(target, own.tokenizer, ids, positions)
    limit = FILE_TYPES[file_type].limit
    return f"checked by {check(compare(ours_PV, theirs_PV), limit, gguf_peer.peer())}"


def own_logits(own: SavedModel, ids: list[int]):
    """Our logits [T, V] of a checkpoint, in float32."""
    return our_logits(own.model, own.load(model_mesh(own.model)), ids)


def model_mesh(model: ModelConfig) -> Mesh:
    """As many devices as can share the tensors of this model evenly, all along `model`."""
    sizes = (model.num_heads, model.num_kv_heads, model.feed_forward_width, model.vocab_size)
    count = math.gcd(jax.device_count(), *sizes)
    return make_mesh(data=1, model=count, devices=jax.devices()[:count])


def _branch_path(out: Path, step: int | None) -> Path:
    named = checkpoint_step(out.name)
    if named is None and (out / "checkpoints").is_dir():
        raise ValueError(
            f"{out} is the folder of a run, with checkpoints of its own; choose another"
        )
    if named is None:
        return out / checkpoint_name(step or 0)
    if step not in (None, named):
        raise ValueError(f"{out} names step {named}, --step says {step}; leave one out")
    return out


def _tell(console: Console, path: Any, model: ModelConfig, what: str = "") -> int:
    """Says what is converted; returns its number of parameters."""
    size = count_parameters(model)
    shape = f"{model.num_layers} layers of width {model.width}, {model.vocab_size:,} rows"
    console.print(f"{path}: {size:,} parameters, {shape}{what}", soft_wrap=True)
    return size


@contextlib.contextmanager
def _progress(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes; gives the function that moves it."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda size: progress.advance(task, size)
