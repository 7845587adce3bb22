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
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from stablelm_jax.data.shard_cache import RemoteShard, ShardCache
from stablelm_jax.data.shards import Shard, ShardInfo, file_sha256, read_spans
from stablelm_jax.storage.files import write_text
from stablelm_jax.storage.remote import RemotePath, as_path
from stablelm_jax.tokenizer.tokenizer import Tokenizer

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
SOURCE_NAME = re.compile(r"[a-z][a-z0-9_]*")
KINDS = ("text", "conversations", "pairs")  # of sources
_ADDED_LATER = {"kind", "chat", "spans_sha256"}  # fields that older manifests lack


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names the file."""


class ManifestMissing(ManifestError):
    """There is no manifest: the source has not been prepared there."""


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer made the ids; `vocab_size` counts rows of the embedding, padding included."""

    name: str
    sha256: str
    vocab_size: int
    eod: int


@dataclasses.dataclass(frozen=True)
class Split:
    """The shards of one split in order, with totals; `text_bytes` is UTF-8 before tokens."""

    shards: tuple[ShardInfo, ...]
    documents: int
    tokens: int
    text_bytes: int

    @classmethod
    def of(cls, infos: Iterable[ShardInfo], text_bytes: int) -> Split:
        infos = tuple(infos)
        documents = sum(info.documents for info in infos)
        return cls(infos, documents, sum(info.tokens for info in infos), text_bytes)


@dataclasses.dataclass(frozen=True)
class SourceManifest:
    """All that is known of one source."""

    source: str  # its name, `[a-z][a-z0-9_]*`
    tokenizer: TokenizerInfo
    train: Split
    held_out: Split  # no document is in both
    # Of the train tokens, in nats: the loss of a model that knows how often each token comes, and
    # nothing else.
    unigram_entropy: float
    languages: tuple[str, ...] = ()  # ISO 639-1 codes
    licence: str = ""  # an SPDX expression or a sentence
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # free fields
    rejected: int = 0  # documents that were not usable, listed in `rejected.jsonl`
    kind: str = "text"  # one of KINDS; what is not text has spans beside its shards
    # The chat template that the conversations were written with; none for text.
    chat: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        """Those of both splits."""
        return self.train.shards + self.held_out.shards


@dataclasses.dataclass(frozen=True)
class Source:
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
    text = json.dumps(dataclasses.asdict(manifest), indent=2, ensure_ascii=False, allow_nan=False)
    # A licence or a name may hold bytes that are no UTF-8: JSON has escapes for them.
    text = text.encode("utf-8", "backslashreplace").decode()
    write_text(pathlib.Path(directory) / MANIFEST_NAME, text + "\n")


def read_manifest(directory: str | os.PathLike | RemotePath) -> SourceManifest:
    """Reads `manifest.json` of a source's directory, which may be a URL.

    Raises:
      ManifestMissing: there is none.
      ManifestError: no JSON, another format version, or a field that is missing, unknown, of the
        wrong type or at odds with another.
    """
    path = as_path(directory) / MANIFEST_NAME
    try:
        fields = json.loads(path.read_bytes())
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
    manifest = _from_json(SourceManifest, fields, f"{path}: manifest")
    if not SOURCE_NAME.fullmatch(manifest.source):
        raise ManifestError(
            f"{path}: source name {manifest.source!r}: use lower case letters, digits and _,"
            " a letter first"
        )
    for name, split in (("train", manifest.train), ("held_out", manifest.held_out)):
        if split != Split.of(split.shards, split.text_bytes):
            raise ManifestError(f"{path}: {name}: its totals are not the sums of its shards")
    has_spans = {bool(info.spans_sha256) for info in manifest.shards}
    if manifest.kind not in KINDS or has_spans - {manifest.kind != "text"}:
        raise ManifestError(
            f"{path}: kind {manifest.kind!r} is unknown, or its shards have spans where text has"
            " none; prepare the source again or use the release that wrote it"
        )
    return manifest


def _from_json(kind: Any, value: Any, where: str) -> Any:
    """`value` as a `kind`, a type of a field above; JSON checks neither names nor types."""
    origin = typing.get_origin(kind) or kind
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        kinds = typing.get_type_hints(kind)
        for name in sorted(value.keys() - kinds.keys()):
            near = difflib.get_close_matches(name, kinds, 1)
            hint = f", {near[0]!r}?" if near else ""
            raise ManifestError(f"{where}: unknown field {name!r}{hint}")
        for name in sorted(kinds.keys() - value.keys() - _ADDED_LATER):
            raise ManifestError(f"{where}: field {name!r} is missing")
        return kind(**{n: _from_json(kinds[n], value[n], f"{where}.{n}") for n in value})
    if origin is tuple and isinstance(value, list):
        return tuple(_from_json(typing.get_args(kind)[0], item, where) for item in value)
    json_type = {tuple: list, float: (int, float), Mapping: dict}.get(origin, origin)
    if not isinstance(value, json_type) or isinstance(value, bool):
        raise ManifestError(f"{where} is {value!r}, which is no {origin.__name__}")
    return value


def open_sources(
    root: str | os.PathLike,
    names: Iterable[str],
    *,
    tokenizer: Tokenizer | TokenizerInfo | None = None,
    cache: ShardCache | None = None,
) -> dict[str, Source]:
    """Reads and verifies the sources `root/<name>`, in sorted order of their names.

    Args:
      root: the data directory, or its URL.
      tokenizer: the run's; None: all sources must agree on one.
      cache: where the shards behind a URL are kept; None: they are read by range.

    Raises:
      ManifestError, ShardError: the first thing that does not hold; the message names the file.
      ValueError: no driver for the URL.
    """
    root, sources = as_path(root, cache), {}
    for name in sorted(names):
        directory = root / name
        path, manifest = directory / MANIFEST_NAME, read_manifest(directory)
        if manifest.source != name:
            raise ManifestError(
                f"{path}: is of source {manifest.source!r}; rename the directory back"
            )
        made_by = manifest.tokenizer
        tokenizer = tokenizer or made_by
        if (made_by.sha256, made_by.eod) != (tokenizer.sha256, tokenizer.eod):
            raise ManifestError(
                f"{path}: prepared with tokenizer {made_by.name!r} (sha256 {made_by.sha256[:12]},"
                f" documents end with token {made_by.eod}), but this run uses the one of sha256"
                f" {tokenizer.sha256[:12]} that ends them with {tokenizer.eod}; prepare the source"
                " again with the tokenizer of the run"
            )
        verify(directory, manifest)
        sources[name] = Source(directory, manifest)
    return sources


def verify(directory: pathlib.Path | RemotePath, manifest: SourceManifest) -> None:
    """Compares the sizes of a source's shards with its manifest; ShardError names what differs.

    Files of spans are small and read whole.
    """
    for info in manifest.shards:
        open_shard(directory / info.file, info)
        if info.spans_sha256:
            read_spans(directory / info.file, info)


def open_shard(path: pathlib.Path | RemotePath, info: ShardInfo) -> Shard | RemoteShard:
    """A shard for reading; ShardError where it is missing, damaged, or not of `info`'s sizes."""
    if isinstance(path, RemotePath):
        return RemoteShard(path, info)
    shard = Shard(path)
    size = shard.num_tokens * shard.dtype.itemsize
    info.compare(path, bytes=size, tokens=shard.num_tokens, documents=shard.num_documents)
    return shard


def check_shard(path: pathlib.Path, info: ShardInfo) -> None:
    """Reads a local shard whole, its index and spans too; ShardError: not as the manifest says."""
    open_shard(path, info).check()
    info.compare(path, sha256=file_sha256(path))
    if info.spans_sha256:
        read_spans(path, info)


def data_hash(manifests: Mapping[str, SourceManifest]) -> str:
    """Identifies the data of a run: contents and order of every source's shards, with the spans.

    File names, paths, dates, licences and provenance do not count; the sources' names do, because
    a row depends on them (`rows.source_seed`).
    """
    contents = {
        name: {
            split: [
                [info.sha256, info.tokens, *filter(None, [info.spans_sha256])]
                for info in getattr(manifest, split).shards
            ]
            for split in ("train", "held_out")
        }
        for name, manifest in sorted(manifests.items())
    }
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
