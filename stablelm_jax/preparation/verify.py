"""`prepare --verify DATA`: whether prepared sources are what their manifests and a recipe say."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Column, Table

from stablelm_jax.data import manifest
from stablelm_jax.data.manifest import SourceManifest, open_shard
from stablelm_jax.data.shards import Shard, ShardError, ShardInfo, read_spans
from stablelm_jax.preparation.recipes import Recipe
from stablelm_jax.storage.remote import RemotePath, as_path

_BLOCK_TOKENS = 1 << 22  # read at once, and the rest of the document that they end in
# Reported sizes are rounded, and what lies at their place today is not quite what lay there.
_TOLERANCE = 0.1


def source_names(root: pathlib.Path | RemotePath, flag: str) -> list[str]:
    """The sources below a data root, those begun and not finished too, sorted.

    ValueError, which names the `flag`, where there is none, or the root cannot be listed.
    """
    try:
        names = filter(manifest.SOURCE_NAME.fullmatch, sorted(names_in(root)))
        found = [n for n in names if names_in(root / n, {manifest.MANIFEST_NAME, ".work"})]
        if not found:
            raise ValueError(f"{root}: no prepared source in it; give the --output of `prepare`")
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from error
    return found


def names_in(folder: pathlib.Path | RemotePath, of: set[str] | None = None) -> set[str]:
    """What lies in a folder, of these names if they are given: then a file holds nothing."""
    try:
        names = set(folder.sizes if isinstance(folder, RemotePath) else os.listdir(folder))
    except OSError as error:
        if of is None:
            raise ValueError(f"{folder}: cannot be listed ({error.strerror or error})") from error
        return set()
    return names if of is None else names & of


def verify_root(data: str, recipe: Recipe | None, workers: int, console: Console) -> int:
    """Compares the sources of a data root with their manifests, and with a `Recipe` or None.

    Prints a table and a line for each difference; returns how many there are.
    """
    root, found, differences = as_path(data), {}, []
    for name in source_names(root, "--verify"):
        try:
            found[name] = manifest.read_manifest(root / name)
            differences += _of_folder(root / name, name, found[name])
        except manifest.ManifestError as error:
            differences.append(str(error))
    shards = []
    for name, made in found.items():
        held_out = _held_out(root / name, made)
        shards += [(root / name / info.file, info, {}) for info in made.held_out.shards]
        shards += [(root / name / info.file, info, held_out) for info in made.train.shards]
    with ThreadPoolExecutor(workers) as pool:  # sha256 lets other threads work
        differences += filter(None, pool.map(lambda shard: _of_shard(*shard), shards))
    if len({(made.tokenizer.sha256, made.tokenizer.eod) for made in found.values()}) > 1:
        differences.append(f"{root}: its sources are of several tokenizers, and a run takes one")
    reported = {each.name: each.tokens_an_epoch for each in recipe.sources} if recipe else {}
    differences += _of_recipe(root, found, reported)
    console.print(_table(found, reported))
    for difference in differences:
        console.print(f"differs: {difference}")
    size = sum(info.bytes for _, info, _ in shards)
    console.print(f"{len(found):,} sources, {len(shards):,} shards, {size:,} bytes read")
    return len(differences)


def _of_shard(
    path: pathlib.Path | RemotePath, info: ShardInfo, held_out: Mapping[bytes, int]
) -> str:
    """How a shard differs from its manifest: sizes, counts, index and sha256; "" if it does not.

    `held_out`: as of `_held_out`; a train shard that has one of these documents differs too.
    """
    copies, digest, marks = 0, hashlib.sha256(), list(held_out.values())
    try:
        shard = open_shard(path, info)
        if isinstance(shard, Shard):
            shard.check()
        dtype = shard.dtype if isinstance(shard, Shard) else np.dtype("<i4")
        for tokens, ends in blocks(shard):
            digest.update(np.ascontiguousarray(tokens, dtype))
            starts, are_like = np.append(0, ends), np.isin(_marks(tokens, ends), marks)
            for number in np.flatnonzero(are_like).tolist():
                ids = tokens[starts[number] : ends[number]]
                copies += document_hash(ids) in held_out
        info.compare(path, sha256=digest.hexdigest())
        if info.spans_sha256:
            read_spans(path, info)
    except ShardError as error:
        return str(error)
    except OSError as error:
        return f"{path}: {error}"
    if not copies:
        return ""
    remedy = "train on what --dedup makes of it, or prepare it again"
    return f"{path}: documents that its source holds out too: {copies:,}; {remedy}"


def _held_out(folder: pathlib.Path | RemotePath, made: SourceManifest) -> dict[bytes, int]:
    """{hash: mark} of the documents that a source holds out, as far as they can be read."""
    found = {}
    for info in made.held_out.shards:
        with contextlib.suppress(ValueError, OSError):  # told where all shards are looked at
            for tokens, ends in blocks(open_shard(folder / info.file, info)):
                hashes = map(document_hash, np.split(tokens, ends[:-1]))
                found |= zip(hashes, _marks(tokens, ends).tolist())
    return found


def _marks(tokens: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """int64 [documents], by which nearly all are told apart: their length and middle token."""
    lengths = np.diff(ends, prepend=0)
    return lengths << 32 | tokens[ends - 1 - lengths // 2]


def document_hash(ids: np.ndarray) -> bytes:
    """128 bits of the tokens of a document, which are its text."""
    return hashlib.blake2b(ids, digest_size=16).digest()


def blocks(shard: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The tokens of a shard, some whole documents at a time, and where each of these ends."""
    offsets = shard.document_offsets
    starts = np.searchsorted(offsets, np.arange(0, offsets[-1], _BLOCK_TOKENS))
    for first, last in itertools.pairwise(np.unique([*starts, len(offsets) - 1]).tolist()):
        ends = offsets[first + 1 : last + 1] - offsets[first]
        yield shard.read(int(offsets[first]), int(offsets[last])), ends


def _of_folder(folder: pathlib.Path | RemotePath, name: str, made: SourceManifest) -> Iterator[str]:
    """What is wrong with the name of a source, and shards that its manifest does not name."""
    if made.source != name:
        yield f"{folder}: its manifest is of source {made.source!r}; rename the folder back"
    stems = {info.file.removesuffix(".bin") for info in made.shards}
    for file in sorted(names_in(folder)):
        stem, dot, ending = file.partition(".")
        if dot and ending in ("bin", "idx", "spans.npy") and stem not in stems:
            yield f"{folder / file}: no shard of the manifest; a rest of something else, remove it"


def _tokens(made: SourceManifest) -> int:
    return made.train.tokens + made.held_out.tokens


def _of_recipe(
    root: pathlib.Path | RemotePath, found: dict[str, SourceManifest], reported: dict[str, float]
) -> Iterator[str]:
    """Sources of a recipe that are missing, or not of about the size that it reports."""
    for name, expected in reported.items():
        if name not in found:
            yield f"{root / name}: missing, and the recipe has it"
        elif expected and abs((tokens := _tokens(found[name])) / expected - 1) > _TOLERANCE:
            yield (
                f"{root / name}: {tokens:,} tokens where the recipe reports {expected:,.0f} an"
                f" epoch, {tokens / expected - 1:+.0%}"
            )


def _table(found: dict[str, SourceManifest], reported: dict[str, float]) -> Table:
    names = ["documents", "tokens", "held out", "shards"] + ["of an epoch"] * bool(reported)
    columns = [Column("source", no_wrap=True), *(Column(name, justify="right") for name in names)]
    table = Table(*columns, box=box.SIMPLE)
    for name, made in found.items():
        documents = made.train.documents + made.held_out.documents
        counts = documents, _tokens(made), made.held_out.documents, len(made.shards)
        row = [f"{count:,}" for count in counts]
        if reported:
            expected = reported.get(name)
            share = f"{_tokens(made) / expected:.0%}" if expected else "not reported"
            row.append("not in the recipe" if expected is None else share)
        table.add_row(name, *row)
    return table
