"""The manifest of a prepared source: `DATA/<source>/manifest.json`, and what is refused by it.

A manifest names the train and held-out shards of one source with their counts and sha256, the
tokenizer that made their ids, and where the text comes from. It is written last, so a source
without one was not prepared to its end.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from stablelm_jax.data import shards
from stablelm_jax.data.shard_cache import RemoteShard, ShardCache
from stablelm_jax.data.shards import Shard, ShardInfo
from stablelm_jax.storage.remote import RemotePath, as_path

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
SOURCE_NAME = re.compile(r"[a-z][a-z0-9_]*")


class ManifestError(ValueError):
    """A manifest, or a shard it lists, that does not hold; the message names the file."""


class ManifestMissing(ManifestError):
    """There is none: the source has not been prepared there."""


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer made the ids; `vocab_size` counts rows of the embedding, padding included."""

    name: str
    sha256: str
    vocab_size: int
    eod: int


@dataclasses.dataclass(frozen=True)
class Split:
    """The shards of one split in their order, with totals. `text_bytes` is UTF-8 before tokens."""

    shards: tuple[ShardInfo, ...]
    documents: int
    tokens: int
    text_bytes: int

    @classmethod
    def of(cls, infos: Iterable[ShardInfo], text_bytes: int) -> Split:
        """The split of these shards, documents and tokens added up."""
        infos = tuple(infos)
        documents = sum(info.documents for info in infos)
        return cls(infos, documents, sum(info.tokens for info in infos), text_bytes)


@dataclasses.dataclass(frozen=True)
class SourceManifest:
    """All that is known of one source.

    Attributes:
      source: its name, `[a-z][a-z0-9_]*`.
      tokenizer: which tokenizer made the ids.
      train, held_out: the two splits; no document is in both.
      unigram_entropy: of the train tokens, in nats; the loss of a model that knows frequencies.
      languages: ISO 639-1 codes.
      licence: an SPDX expression or a sentence.
      provenance: free fields (where from, when, by which command).
      rejected: documents that were not usable, listed in `rejected.jsonl`.
    """

    source: str
    tokenizer: TokenizerInfo
    train: Split
    held_out: Split
    unigram_entropy: float
    languages: tuple[str, ...] = ()
    licence: str = ""
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rejected: int = 0
    format_version: int = FORMAT_VERSION

    def __post_init__(self):
        if not SOURCE_NAME.fullmatch(self.source):
            raise ManifestError(
                f"source name {self.source!r}: use lower case letters, digits and _, a letter first"
            )


@dataclasses.dataclass(frozen=True)
class Source:
    """A prepared source: its directory and its manifest."""

    directory: pathlib.Path | RemotePath
    manifest: SourceManifest

    @property
    def name(self) -> str:
        return self.manifest.source


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that `counts` [V] describes; zero counts add nothing."""
    counts = np.asarray(counts, np.float64)
    if counts.sum() <= 0:
        raise ValueError("unigram entropy of no token at all")
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def write_manifest(directory: str | os.PathLike, manifest: SourceManifest) -> None:
    """Writes `manifest.json` into the source's directory, whole or not at all."""
    path = pathlib.Path(directory) / MANIFEST_NAME
    partial = path.with_name(path.name + ".partial")
    text = json.dumps(dataclasses.asdict(manifest), indent=2, ensure_ascii=False, allow_nan=False)
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_manifest(directory: str | os.PathLike | RemotePath) -> SourceManifest:
    """Reads `manifest.json` of a source's directory, which may be a URL.

    Raises:
      ManifestMissing: there is none.
      ManifestError: it is no JSON, of another format version, or a field is missing,
        unknown, of the wrong type or at odds with another.
    """
    path = as_path(directory) / MANIFEST_NAME
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ManifestMissing(
            f"{path}: missing; prepare this source first (python -m stablelm_jax.prepare)"
        ) from None
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: cannot be read as JSON ({error})") from error
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if version != FORMAT_VERSION:
        raise ManifestError(
            f"{path}: format_version {version!r} where {FORMAT_VERSION} is known;"
            " prepare the source again or use the release that wrote it"
        )
    try:
        manifest = _manifest_from(fields)
    except ManifestError as error:
        raise ManifestError(f"{path}: {error}") from None
    return manifest


def _manifest_from(fields: dict) -> SourceManifest:
    fields = dict(fields)
    fields["tokenizer"] = _record(TokenizerInfo, fields.get("tokenizer"), "tokenizer")
    for split in ("train", "held_out"):
        fields[split] = _split_from(fields.get(split), split)
    if isinstance(fields.get("languages"), list):
        fields["languages"] = tuple(fields["languages"])
    return _record(SourceManifest, fields, "manifest")


def _split_from(fields: Any, name: str) -> Split:
    if not isinstance(fields, dict) or not isinstance(fields.get("shards"), list):
        raise ManifestError(f"{name}: no list of shards")
    infos = tuple(_record(ShardInfo, info, f"{name}.shards") for info in fields["shards"])
    split = _record(Split, {**fields, "shards": infos}, name)
    if split != Split.of(infos, split.text_bytes):
        raise ManifestError(f"{name}: documents or tokens are not the sums of its shards")
    return split


_FIELD_TYPES = {
    "str": str,
    "int": int,
    "float": (int, float),
    "Mapping[str, Any]": dict,
    "tuple[str, ...]": tuple,
    "tuple[ShardInfo, ...]": tuple,
    "TokenizerInfo": TokenizerInfo,
    "Split": Split,
}


def _record(kind: type, values: Any, where: str):
    """`kind(**values)`, after a look at the names and types, which JSON does not check."""
    if not isinstance(values, dict):
        raise ManifestError(f"{where}: missing or no object")
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    for name in sorted(values.keys() - types.keys()):
        near = difflib.get_close_matches(name, types, 1)
        hint = f", {near[0]!r}?" if near else ""
        raise ManifestError(f"{where}: unknown field {name!r}{hint}")
    for name, type_name in types.items():
        if name not in values:
            raise ManifestError(f"{where}: field {name!r} is missing")
        value = values[name]
        if not isinstance(value, _FIELD_TYPES[type_name]) or isinstance(value, bool):
            raise ManifestError(f"{where}: field {name!r} is {value!r}, which is no {type_name}")
    return kind(**values)


def open_sources(
    root: str | os.PathLike,
    names: Iterable[str],
    *,
    tokenizer_sha256: str | None = None,
    cache: ShardCache | None = None,
) -> dict[str, Source]:
    """Reads and verifies the sources `root/<name>`, in sorted order of their names.

    Args:
      root: the data directory, or its URL.
      names: which sources.
      tokenizer_sha256: of the tokenizer that the run uses; None: all sources must agree on one.
      cache: where the shards behind a URL are kept; None: they are read by range.

    Raises:
      ManifestError: one of them does not hold; the message names the file.
      ValueError: no driver for the URL.
    """
    root, sources = as_path(root, cache), {}
    for name in sorted(names):
        directory = root / name
        manifest = read_manifest(directory)
        if manifest.source != name:
            raise ManifestError(
                f"{directory / MANIFEST_NAME}: is of source {manifest.source!r};"
                " rename the directory back"
            )
        tokenizer_sha256 = tokenizer_sha256 or manifest.tokenizer.sha256
        verify(directory, manifest, tokenizer_sha256=tokenizer_sha256)
        sources[name] = Source(directory, manifest)
    return sources


def verify(
    directory: str | os.PathLike | RemotePath,
    manifest: SourceManifest,
    *,
    tokenizer_sha256: str | None = None,
    full: bool = False,
) -> None:
    """Holds the shards of a source against its manifest.

    Args:
      directory: of the source; behind a URL the bytes of its `.bin` files are compared.
      manifest: its manifest.
      tokenizer_sha256: what the ids must have been made with; None: any tokenizer.
      full: also read every byte: sha256, the whole index, and where documents end; not by URL.

    Raises:
      ManifestError, ShardError: the first thing that does not hold, naming the file.
    """
    directory = as_path(directory)
    made_by = manifest.tokenizer
    if tokenizer_sha256 is not None and made_by.sha256 != tokenizer_sha256:
        raise ManifestError(
            f"{directory / MANIFEST_NAME}: prepared with tokenizer {made_by.name!r} (sha256"
            f" {made_by.sha256[:12]}), but this run uses the one of sha256"
            f" {tokenizer_sha256[:12]}; prepare the source again with the tokenizer of the run"
        )
    for info in manifest.train.shards + manifest.held_out.shards:
        open_shard(directory / info.file, info)
        if full:
            _verify_contents(directory / info.file, info, made_by)


def open_shard(path: pathlib.Path | RemotePath, info: ShardInfo) -> Shard | RemoteShard:
    """The shard that a manifest lists, for reading.

    Raises:
      ManifestError, ShardError: missing, damaged, or not of the manifest's sizes.
    """
    if isinstance(path, RemotePath):
        return RemoteShard(path, info)
    shard = Shard(path)
    found = (path.stat().st_size, shard.num_tokens, shard.num_documents)
    expected = (info.bytes, info.tokens, info.documents)
    for what, one, other in zip(("bytes", "tokens", "documents"), found, expected, strict=True):
        if one != other:
            raise ManifestError(
                f"{path}: {one} {what} where the manifest says {other};"
                " restore the file or prepare the source again"
            )
    return shard


def _verify_contents(path: pathlib.Path, info: ShardInfo, tokenizer: TokenizerInfo) -> None:
    if shards.file_sha256(path) != info.sha256:
        raise ManifestError(
            f"{path}: sha256 differs from the manifest; restore the file or prepare again"
        )
    shard = Shard(path)
    shard.check()
    if not shard.num_tokens:
        return
    if (shard.tokens[shard.document_offsets[1:] - 1] != tokenizer.eod).any():
        raise ManifestError(f"{path}: a document does not end with token {tokenizer.eod}")
    if shard.tokens.max() >= tokenizer.vocab_size:
        raise ManifestError(f"{path}: a token outside the vocabulary of {tokenizer.vocab_size}")


def data_hash(manifests: Mapping[str, SourceManifest]) -> str:
    """Identifies the data of a run: contents and order of every source's shards, nothing else.

    File names, paths, dates, licences and provenance do not enter; the sources' names do, because
    a row depends on them (`rows.source_seed`).
    """
    contents = {
        name: {
            split: [[info.sha256, info.tokens] for info in getattr(manifest, split).shards]
            for split in ("train", "held_out")
        }
        for name, manifest in sorted(manifests.items())
    }
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
