"""Documents of a prepared source: a random sample, the oddest ones, and what the source is made of.

However large the source is, at most MAX_SHARDS of its shards are opened, one after the other, and
MAX_TOKENS of each document of the sample are kept.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from stablelm_jax.data.manifest import Source, open_shard, open_sources, read_manifest
from stablelm_jax.data.shards import ShardInfo, read_spans
from stablelm_jax.reporting.inspection import Document, parts_of
from stablelm_jax.storage.remote import as_path
from stablelm_jax.tokenizer.tokenizer import ARCADE100K, Tokenizer, load_tokenizer

MAX_SHARDS, MAX_TOKENS = 256, 16_384
GRAM = 8  # tokens of a run that is looked for again
MAX_LANGUAGES, LANGUAGE_CHARS = 500, 1000  # documents whose language is told, by so much text
_QUANTILES = {"least": 0.0, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "most": 1.0}


class Found(NamedTuple):
    """A train document of a source."""

    number: int  # in the source, from 0, as `data.skip` counts them
    info: ShardInfo  # of its shard
    within: int  # its number there
    offset: int  # of its first token there
    tokens: int
    ids: np.ndarray  # the first MAX_TOKENS of them

    def shown(self, source: Source, tokenizer: Tokenizer, note: str) -> Document:
        """For a person, under its number and a note; of a conversation, with its trained spans."""
        path, parts = source.directory / self.info.file, ()
        if source.manifest.kind != "text":
            spans, trained = read_spans(path, self.info), np.zeros(len(self.ids), bool)
            for _, first, last in spans[spans[:, 0] == self.within].tolist():
                trained[first:last] = True
            parts = parts_of(tokenizer, self.ids, trained)
        item = f"{source.name}:documents:{self.number}" + (f", {note}" if note else "")
        place = str(path), self.within, self.offset, self.tokens, True
        return Document(*place, tokenizer.decode(self.ids.tolist()), item, parts)


class Sample(NamedTuple):
    """What was seen of a source."""

    shards: int  # how many were opened; all their documents gave `octaves` and `longest`
    octaves: np.ndarray  # int64 [48], how many documents have 2**i to 2**(i + 1) - 1 tokens
    longest: list[Found]  # longest first
    drawn: list[Found]  # a random sample, in random order


def open_source(root: str, name: str, tokenizer: str | None) -> tuple[Source, Tokenizer]:
    """A source, and the tokenizer that it was prepared with, which may lie beside it.

    Raises:
      ValueError: one of them is missing or damaged, or they do not belong together.
    """
    place = tokenizer or read_manifest(as_path(root) / name).tokenizer.name
    beside = Path(root) / "tokenizer.json"
    if not tokenizer and place != ARCADE100K and not Path(place).exists() and beside.exists():
        place = str(beside)
    found = load_tokenizer(place)
    return open_sources(root, [name], tokenizer=found)[name], found


def sample(source: Source, size: int, longest: int, seed: int) -> Sample:
    """Draws `size` train documents, the same at every call, and finds so many of the longest."""
    rng, infos = np.random.default_rng(seed), source.manifest.train.shards
    before = np.cumsum([0, *(info.documents for info in infos)]).tolist()

    @functools.lru_cache(maxsize=1)
    def opened(place: int) -> Any:
        return open_shard(source.directory / infos[place].file, infos[place])

    def found(place: int, within: int) -> Found:
        first, last = opened(place).document_offsets[within : within + 2].tolist()
        ids = opened(place).read(first, min(last, first + MAX_TOKENS))
        return Found(before[place] + within, infos[place], within, first, last - first, ids)

    full = [place for place, info in enumerate(infos) if info.documents]
    chosen = np.sort(rng.permutation(full)[:MAX_SHARDS]).tolist()
    total = sum(infos[place].documents for place in chosen)
    wanted, seen = np.sort(rng.choice(total, min(size, total), replace=False)), 0
    octaves, drawn, best = np.zeros(48, np.int64), [], []
    for place in chosen:
        count = infos[place].documents
        lengths = np.diff(opened(place).document_offsets)
        octaves += np.bincount(np.frexp(np.maximum(lengths, 1))[1] - 1, minlength=48)
        own = wanted[(wanted >= seen) & (wanted < seen + count)] - seen
        drawn += [found(place, within) for within in own.tolist()]
        top = np.argpartition(-lengths, min(longest, count - 1))[:longest].tolist()
        best += [(int(lengths[within]), place, within) for within in top]
        best, seen = heapq.nlargest(longest, best), seen + count
    shuffled = [drawn[number] for number in rng.permutation(len(drawn))]
    return Sample(len(chosen), octaves, [found(*where) for _, *where in best], shuffled)


def choose(
    show: str, seen: Sample, most: int, source: Source, checkpoint: str | None
) -> list[tuple[Found, str]]:
    """The documents to look at, the highest first, each with a note why.

    Raises:
      ValueError: `checkpoint` cannot be used.
    """
    if show in ("random", "longest"):
        return [(found, "") for found in (seen.drawn if show == "random" else seen.longest)[:most]]
    if show == "loss":
        values, note = _losses(checkpoint, source, seen.drawn), "{:.3f} nats a token"
    else:
        values = [repeated_share(found.ids) for found in seen.drawn]
        note = "{:.1%} of its runs of " + f"{GRAM} tokens came before in it"
    order = np.argsort(-np.array(values), kind="stable")[:most].tolist()
    return [(seen.drawn[place], note.format(values[place])) for place in order]


def repeated_share(ids: np.ndarray) -> float:
    """The share of a document's runs of GRAM tokens that came before in it; 0 where it has few."""
    if len(ids) < 2 * GRAM:
        return 0.0
    factors = np.random.default_rng(0).integers(1, 2**63, GRAM, dtype=np.uint64) * 2 + 1
    runs = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64), GRAM)
    hashes = (runs * factors).sum(axis=1, dtype=np.uint64)
    return 1 - len(np.unique(hashes)) / len(hashes)


def _losses(checkpoint: str, source: Source, found: Sequence[Found]) -> list[float]:
    """The mean loss of each document, over as many tokens as the checkpoint's context holds."""
    import jax.numpy as jnp

    from stablelm_jax.checkpoint.saved_model import SavedModel
    from stablelm_jax.evaluation.scoring import Scorer
    from stablelm_jax.model.compute import Compute
    from stablelm_jax.parallel.mesh import make_mesh

    saved, mesh = SavedModel.open(checkpoint), make_mesh()
    if saved.tokenizer.sha256 != source.manifest.tokenizer.sha256:
        raise ValueError(f"{saved.path} was trained with another tokenizer than this source's")
    on_cpu, length = mesh.devices.flat[0].platform == "cpu", saved.max_positions
    dtype = jnp.dtype("float32" if on_cpu else "bfloat16")
    compute = Compute(dtype=dtype, num_valid_ids=saved.num_valid_ids)
    scorer = Scorer(saved.model, mesh, length, compute, batch_tokens=16_384)
    texts = [document.ids[: length + 1].tolist() for document in found]
    requests = [(ids[:-1], ids[1:]) for ids in texts]
    answers = scorer.score(scorer.compute_copy(saved.load(mesh)), requests, lambda _: None)
    return [-nats / max(len(ids) - 1, 1) for (nats, _), ids in zip(answers, texts)]


def statistics(source: Source, tokenizer: Tokenizer, seen: Sample) -> dict[str, Any]:
    """What the sample says of the source, as JSON; `tables` tells it to a person."""
    train, drawn = source.manifest.train, seen.drawn
    texts = [tokenizer.decode(f.ids[f.ids != tokenizer.eod].tolist()) for f in drawn]
    ratios = [len(text.encode()) / len(f.ids) for text, f in zip(texts, drawn)]
    copies = Counter((hashlib.sha256(f.ids.tobytes()).digest(), f.tokens) for f in drawn)
    lengths = {2**n: count for n, count in enumerate(seen.octaves.tolist()) if count}
    halves = dict(sorted(Counter(int(2 * ratio) / 2 for ratio in ratios).items()))
    return {
        "source": source.name,
        "kind": source.manifest.kind,
        "documents": train.documents,
        "tokens": train.tokens,
        "shards": [seen.shards, len(train.shards)],
        "sample": len(drawn),
        "tokens_a_document": _spread([f.tokens for f in drawn]) | {"histogram": lengths},
        "bytes_a_token": _spread(ratios) | {"histogram": halves},
        "repeated_share": _spread([repeated_share(f.ids) for f in drawn]),
        "copies": len(drawn) - len(copies),
        "languages": _languages(texts[:MAX_LANGUAGES]),
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {name: float(np.quantile(values, share)) for name, share in _QUANTILES.items()}


def _languages(texts: Sequence[str]) -> dict[str, int] | None:
    """How many texts are in each language; None where the package that tells is not there."""
    try:
        import py3langid
    except ImportError:
        return None
    told = Counter(py3langid.classify(text[:LANGUAGE_CHARS])[0] for text in texts)
    return dict(told.most_common())


def tables(found: Mapping[str, Any]) -> Iterator[Table | str]:
    """`statistics` for a terminal."""
    shards, all_shards = found["shards"]
    yield (
        f"{found['source']}: {found['kind']}; documents to train: {found['documents']:,}, tokens: "
        f"{found['tokens']:,}. Looked into shards: {shards:,} of {all_shards:,}; into random"
        f" documents: {found['sample']:,}, up to {MAX_TOKENS:,} tokens of each"
    )
    for key, of in (("tokens_a_document", "shards"), ("bytes_a_token", "sample")):
        counts, name = found[key]["histogram"], key.replace("_", " ")
        table = Table(f"{name}, from", f"documents of the {of}", "")
        for least, count in counts.items():
            table.add_row(f"{least:,}", f"{count:,}", "█" * -(-24 * count // max(counts.values())))
        yield table
    table = Table("of the sample", *_QUANTILES)
    for key in ("tokens_a_document", "bytes_a_token", "repeated_share"):
        table.add_row(key.replace("_", " "), *(f"{found[key][name]:,.4g}" for name in _QUANTILES))
    yield table
    yield f"repeated share: of a document's runs of {GRAM} tokens, those that came before in it"
    yield f"copies: {found['copies']:,} of the sample repeat another one of it"
    told = found["languages"] or {}
    counts = ", ".join(f"{name} {count:,}" for name, count in told.items())
    by = f"by py3langid, of {sum(told.values()):,} of the sample: {counts}"
    yield f"languages: {by if told else 'not told, for want of the package py3langid'}"
