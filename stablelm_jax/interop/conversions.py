"""The conversions from beginning to end: told, written aside, checked, in place.

Each returns what to tell last. Where the source cannot be read, or what was written computes
something else, each raises a ValueError and leaves nothing.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.progress import Progress

from stablelm_jax.checkpoint.merged import adapter_leaves, parent_of
from stablelm_jax.checkpoint.names import checkpoint_name, checkpoint_step
from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.interop import from_hf as reading
from stablelm_jax.interop import gguf_export, gguf_types, hf_config, llama_cpp, peft_files
from stablelm_jax.interop import importance as importance_matrix
from stablelm_jax.interop import to_hf as writing
from stablelm_jax.interop.hf_reference import reference_logits
from stablelm_jax.interop.safetensors_files import DTYPES
from stablelm_jax.interop.verify import check, our_logits, prompt_ids
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.lora import Lora
from stablelm_jax.model.parameters import count_parameters, nest
from stablelm_jax.parallel.mesh import make_mesh
from stablelm_jax.run.console import make_console
from stablelm_jax.storage.files import check_writable, new_result, replacing
from stablelm_jax.tokenizer.chat import ChatTemplate

_console = make_console(stderr=True)
_say = functools.partial(_console.print, soft_wrap=True)
_IMPORTANCE_ROWS = 128  # unless told otherwise


def from_hf(
    source: Path, out: Path, *, step: int | None, tokenizer: str | None, verify: bool, force: bool
) -> str:
    """Writes the checkpoint `out`, or `out/global_step<step>`."""
    out = _named(out, step)
    directory = reading.open_directory(source, tokenizer)
    size = _tell(source, directory.model)
    for switch in directory.dropped:
        _say(f"  {switch.replace('_', ' ')}es are zero throughout: left out")
    mesh, chat = _model_mesh(directory.model), _told_chat(directory)
    with new_result(out, force=force, source=source) as target:
        with _bar("reading", size) as advance:
            params = reading.load_params(directory, mesh, advance)
        with _console.status("writing"):
            reading.write_checkpoint(directory, params, target, chat, source=source)
        del params
        if verify:
            ids = prompt_ids(directory.tokenizer)
            own = SavedModel.open(target)
            ours_TV = our_logits(own.model, own.load(mesh), ids)
            who, theirs_TV = reference_logits(directory.path, ids)
            _say(f"checked by {check(who, ours_TV, theirs_TV)}")
    return f"{out} is whole: generate, evaluate and convert take it as --checkpoint"


def _told_chat(directory: reading.Directory) -> ChatTemplate | None:
    """The chat template of a directory, and says of it; none where it is of no use here."""
    try:
        chat = reading.chat_of(directory)
    except ValueError as error:
        _say(f"  its chat template goes along, but is of no use here: {error}", markup=False)
        return None
    if chat:
        _say(f"  its chat template ends an answer with {' or '.join(chat.enders)}", markup=False)
    return chat


def to_hf(
    checkpoint: str,
    out: Path,
    *,
    dtype: str,
    revision: str | None,
    max_file_bytes: int,
    tokenizer: str | None,
    verify: bool,
    force: bool,
) -> str:
    """Writes the directory `out`, in a type of safetensors_files.DTYPES."""
    own = SavedModel.open(checkpoint, tokenizer)
    hf_config.check_export(own.model, "transformers", tied=True)
    size = _tell(own.path, own.model, f", to {dtype}")
    revision = revision or own.name
    with new_result(out, force=force, source=Path(own.path)) as target:
        with _bar("writing", size) as advance:
            writing.write_directory(own, target, dtype, max_file_bytes, revision, advance)
        if verify:
            with _console.status("comparing every tensor"):
                writing.check_bits(own, target, dtype)
            _say(f"checked by {_checked_directory(own, target, dtype)}")
    return f"{out} is whole: AutoModelForCausalLM.from_pretrained({str(out)!r}) loads it"


def to_peft(
    checkpoint: str, out: Path, *, base: str, tokenizer: str | None, verify: bool, force: bool
) -> str:
    """Writes the adapters of a LoRA run as the directory `out`; `base`: what it calls the model."""
    own = SavedModel.open(checkpoint, tokenizer)
    if "lora" not in own.run:
        raise ValueError(f"{own.path} holds whole weights, no adapters; use convert to-hf")
    hf_config.check_export(own.model, "transformers", tied=True)
    lora, flat = Lora.from_json(own.run["lora"]), dict(adapter_leaves(own.path, own.run))
    _say(f"{own.path}: adapters of rank {lora.rank} on {', '.join(lora.targets)}")
    with new_result(out, force=force, source=Path(own.path)) as target:
        peft_files.write_adapters(target, own.model, lora, flat, base or own.run["lora"]["parent"])
        if verify:
            again, values = peft_files.read_adapters(target, own.model)
            same = all(np.array_equal(values[name], value) for name, value in flat.items())
            if not same or again.scale != lora.scale or set(again.targets) != set(lora.targets):
                raise ValueError(f"{out} was not written as it should be; try again")
            _say("checked: every value reads back as it was")
    return f"{out} is whole: PeftModel.from_pretrained(model, {str(out)!r}) adds it"


def from_peft(
    source: Path,
    out: Path,
    *,
    parent: str,
    step: int | None,
    tokenizer: str | None,
    verify: bool,
    force: bool,
) -> str:
    """Writes the checkpoint `out`, or `out/global_step<step>`: adapters of `parent`'s weights."""
    under = SavedModel.open(parent, tokenizer)
    lora, flat = peft_files.read_adapters(source, under.model)
    _say(f"{source}: adapters of rank {lora.rank} on {', '.join(lora.targets)}, of {under.path}")
    out = _named(out, step)
    with new_result(out, force=force, source=source) as target:
        adapters, item = nest(flat), lora.to_json() | parent_of(under.path, under.run)
        reading.write_checkpoint(
            under,
            jax.tree.map(jnp.asarray, adapters),
            target,
            under.chat,
            source=source,
            lora=item,
            num_valid_ids=under.num_valid_ids,
        )
        if verify:
            ids, mesh = prompt_ids(under.tokenizer), _model_mesh(under.model)
            ours_TV = our_logits(under.model, SavedModel.open(target, tokenizer).load(mesh), ids)
            joined = lora.join(under.load(mesh), jax.tree.map(jnp.asarray, adapters))
            theirs_TV = our_logits(under.model, joined, ids)
            _say(f"checked by {check('its parent with A and B beside it', ours_TV, theirs_TV)}")
    return f"{out} is whole: generate, evaluate and convert take it as --checkpoint"


def _named(out: Path, step: int | None) -> Path:
    """The checkpoint that `out` and --step name together."""
    named = checkpoint_step(out.name)
    if named is None and (out / "checkpoints").is_dir():
        raise ValueError(f"{out} is the folder of a run with its own checkpoints; choose another")
    if named is not None and step not in (None, named):
        raise ValueError(f"{out} names step {named}, --step says {step}; leave one out")
    return out if named is not None else out / checkpoint_name(step or 0)


def _checked_directory(own: SavedModel, target: Path, dtype: str) -> str:
    """Compares theirs with ours of the rounded weights, then with ours of the weights as trained:
    what the type costs."""
    ids = prompt_ids(own.tokenizer)
    params = own.load(_model_mesh(own.model))
    trained_TV = stored_TV = our_logits(own.model, params, ids)
    if dtype != "float32":
        stored_TV = our_logits(own.model, _rounded(params, dtype), ids)
    del params
    who, theirs_TV = reference_logits(target, ids)
    told = check(who, stored_TV, theirs_TV)
    if dtype != "float32":
        told += f"\n{check(f'{dtype} costs', trained_TV, theirs_TV, DTYPES[dtype][0])}"
    return told


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
    imatrix: Path | None = None,
    imatrix_rows: int | None = None,
    save_imatrix: Path | None = None,
    tokenizer: str | None,
    verify: bool,
    force: bool,
) -> str:
    """Writes the GGUF file `out`, of a type of gguf_types.FILE_TYPES.

    `imatrix`: a file of llama.cpp's, or prepared data of which so many rows are taken.
    """
    if (imatrix_rows or save_imatrix) and not (imatrix and imatrix.is_dir()):
        raise ValueError("--imatrix-rows and --save-imatrix: only with --imatrix DATA, a folder")
    if save_imatrix:
        check_writable(save_imatrix)
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name the file to write, such as {out / 'model.gguf'}")
    own = SavedModel.open(checkpoint, tokenizer)
    hf_config.check_export(own.model, "llama.cpp", tied=False)
    if gguf_types.needs_llama_cpp(file_type):
        gguf_types.llama_cpp_function()  # before any work is done
    elif imatrix:
        raise ValueError(f"{file_type} takes no importance matrix; K-quants and iq4_xs do")
    stored = gguf_export.stored_tensors(own.model, file_type, imatrix is not None)
    num_bytes = sum(one.num_bytes for one in stored)
    size = _tell(own.path, own.model, f", to {file_type}: {num_bytes / 1e9:.2f} GB")
    _tell_fallen_back(stored)
    importance = _importance(own, imatrix, imatrix_rows, save_imatrix) if imatrix else {}
    with new_result(out, force=force, source=Path(own.path)) as target:
        if (free := shutil.disk_usage(target.parent).free) < num_bytes:
            raise ValueError(
                f"{out} needs {num_bytes / 1e9:.3g} GB, its disk has {free / 1e9:.3g} free: free "
                "some, or choose a smaller --type"
            )
        with _bar("writing", size) as advance:
            gguf_export.write_file(own, target, file_type, advance, importance)
        if verify:
            with _console.status("comparing every tensor, then what they compute"):
                gguf_export.check_file(own, target, file_type, importance)
                told = _checked_by_llama_cpp(own, target, file_type)
            _say(f"checked by {told}")
    return f"{out} is whole: llama-cli -m {out} runs it"


def _importance(
    own: SavedModel, source: Path, rows: int | None, save: Path | None
) -> dict[str, np.ndarray]:
    """The importance matrix of a file or of held-out text, saved where wished."""
    if source.is_file():
        return importance_matrix.read_file(source, own.model)
    rows = rows or _IMPORTANCE_ROWS
    with _bar(f"importance of {source}", rows) as advance:
        params = own.load(_model_mesh(own.model))
        found = importance_matrix.of_data(own, params, source, rows, advance)
    if save:
        with replacing(save) as aside:
            importance_matrix.write_file(aside, found, str(source))
    return found


def _tell_fallen_back(stored: Sequence[gguf_export.Stored]) -> None:
    """Says which tensors are of another type than the file's, since their rows do not suit it."""
    found = collections.defaultdict(list)
    for one in stored:
        if one.wished is not None:
            found[one.wished, one.quantization, one.tensor.shape[-1]].append(one.name)
    for (wished, type_, columns), names in found.items():
        _say(
            f"  {len(names)} tensors, such as {names[0]}, have rows of {columns} values, no whole "
            f"number of {wished.name.lower()} blocks: stored as {type_.name.lower()}"
        )


def _checked_by_llama_cpp(own: SavedModel, target: Path, file_type: str) -> str:
    ids = prompt_ids(own.tokenizer)[: own.max_positions]
    try:
        llama = llama_cpp.LlamaCpp(target, len(ids))
    except ImportError as error:
        return f"gguf, which read every value back; llama.cpp would compute a prompt too: {error}"
    llama.check_tokens(own.tokenizer)
    ours_TV = our_logits(own.model, own.load(_model_mesh(own.model)), ids)
    code = gguf_types.plain_type(file_type).name
    return check(llama_cpp.name(), ours_TV, llama.logits([ids]), code)


def _model_mesh(model: ModelConfig) -> Mesh:
    """As many devices as can share the tensors of this model evenly, all along `model`."""
    sizes = (model.num_heads, model.num_kv_heads, model.feed_forward_width, model.vocab_size)
    count = math.gcd(jax.device_count(), *sizes)
    return make_mesh(data=1, model=count, devices=jax.devices()[:count])


def _tell(path: Any, model: ModelConfig, what: str = "") -> int:
    """Says what is converted; returns its number of parameters."""
    size = count_parameters(model)
    shape = f"{model.num_layers} layers of width {model.width}, {model.vocab_size:,} rows"
    _say(f"{path}: {size:,} parameters, {shape}{what}")
    return size


@contextlib.contextmanager
def _bar(what: str, size: int) -> Iterator[Callable[[int], None]]:
    """A bar of so many parameters; gives the function that moves it."""
    with Progress(console=_console, transient=True) as progress:
        yield functools.partial(progress.advance, progress.add_task(what, total=size))
