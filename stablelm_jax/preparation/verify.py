"""`prepare --verify DATA`: whether prepared sources are what their manifests and a recipe say."""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from rich import box
from rich.console import Console
from rich.table import Column, Table

from stablelm_jax.data import manifest
from stablelm_jax.data.manifest import SourceManifest, check_shard, open_shard
from stablelm_jax.data.shards import ShardError, ShardInfo, read_spans
from stablelm_jax.preparation.recipes import Recipe
from stablelm_jax.storage.remote import RemotePath, as_path

_BLOCK_TOKENS = 1 << 24  # of a shard behind a URL, read at once
# Reported sizes are rounded, and what lies at their place today is not quite what lay there.
_TOLERANCE = 0.1


def source_names(root: pathlib.Path | RemotePath) -> list[str]:
    """The sources below a data root, those begun and not finished too, sorted.

    ValueError where there is none, or the root cannot be listed.
    """
    names = filter(manifest.SOURCE_NAME.fullmatch, sorted(names_in(root)))
    found = [n for n in names if names_in(root / n, {manifest.MANIFEST_NAME, ".work"})]
    if not found:
        raise ValueError(f"{root}: no prepared source in it; give the --output of `prepare`")
    return found


def names_in(folder: pathlib.Path | RemotePath, of: set[str] | None = None) -> set[str]:
    """What lies in a folder, of these names if they are given: then a file holds nothing."""
    try:
        names = set(folder.sizes if isinstance(folder, RemotePath) else os.listdir(folder))
    except OSError as error:
        if of is None:
            raise ValueError(f"{folder}: cannot be listed ({error})") from error
        return set()
    return names if of is None else names & of


def verify_root(data: str, recipe: Recipe | None, workers: int, console: Console) -> int:
    """Compares the sources of a data root with their manifests, and with a `Recipe` or None.

    Prints a table and a line for each difference; returns how many there are.
    """
    root, found, differences = as_path(data), {}, []
    for name in source_names(root):
        try:
            found[name] = manifest.read_manifest(root / name)
            differences += _of_folder(root / name, name, found[name])
        except manifest.ManifestError as error:
            differences.append(str(error))
    shards = [(root / name / info.file, info) for name in found for info in found[name].shards]
    with ThreadPoolExecutor(workers) as pool:  # sha256 lets other threads work
        differences += filter(None, pool.map(lambda shard: _of_shard(*shard), shards))
    if len({(made.tokenizer.sha256, made.tokenizer.eod) for made in found.values()}) > 1:
        differences.append(f"{root}: its sources are of several tokenizers, and a run takes one")
    reported = {each.name: each.tokens_an_epoch for each in recipe.sources} if recipe else {}
    differences += _of_recipe(root, found, reported)
    console.print(_table(found, reported))
    for difference in differences:
        console.print(f"differs: {difference}")
    size = sum(info.bytes for _, info in shards)
    console.print(f"{len(found):,} sources, {len(shards):,} shards, {size:,} bytes read")
    return len(differences)


def _of_shard(path: pathlib.Path | RemotePath, info: ShardInfo) -> str:
    """How a shard differs from its manifest: sizes, counts, index and sha256; "" if it does not."""
    try:
        if not isinstance(path, RemotePath):
            check_shard(path, info)
            return ""
        shard, digest = open_shard(path, info), hashlib.sha256()
        info.compare(path, documents=len(shard.document_offsets) - 1)
        for first in range(0, info.tokens, _BLOCK_TOKENS):
            digest.update(shard.read(first, min(first + _BLOCK_TOKENS, info.tokens)))
        info.compare(path, sha256=digest.hexdigest())
        if info.spans_sha256:
            read_spans(path, info)
    except ShardError as error:
        return str(error)
    except OSError as error:
        return f"{path}: {error}"
    return ""


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
