"""What `prepare` says of a source: what it is about to do, and what became of it."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping

from rich import box
from rich.table import Column, Table

from stablelm_jax.data.manifest import SourceManifest
from stablelm_jax.preparation.executors import Executor
from stablelm_jax.preparation.lists import CONTAMINATED_NAME
from stablelm_jax.preparation.prepare_source import Preparation

_REASONS_SHOWN = 5
_LOSS_WARNED_OF = 0.001


def counts(made: SourceManifest) -> str:
    """How much a source holds, in a few words."""
    what, *numbers = _items(made)
    tokens = made.train.tokens + made.held_out.tokens
    return f"{sum(numbers):,} {what}, {tokens:,} tokens"


def _items(made: SourceManifest) -> tuple[str, int, int]:
    """What the source holds, and how many of it are trained on and held out."""
    sides = 2 if made.kind == "pairs" else 1
    what = "documents" if made.kind == "text" else made.kind
    return what, made.train.documents // sides, made.held_out.documents // sides


def plan(preparation: Preparation, executor: Executor, resumed: bool) -> str:
    """What is about to be done."""
    kinds = collections.Counter(
        file.kind + (f".{file.compression}" if file.compression else "")
        for file in preparation.files
    )
    files = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    tokenizer = preparation.tokenizer
    return (
        f"{preparation.job.source}: files: {files}; {preparation.input_bytes / 1e6:,.1f} MB;"
        f" chunks: {len(preparation.plan.chunks):,}; {executor.kind} workers: {executor.workers};"
        f" tokenizer {tokenizer.name} ({tokenizer.sha256[:12]}){_filters(preparation)}"
        + ("; going on with what was begun" if resumed else "")
    )


def _filters(preparation: Preparation) -> str:
    asked = preparation.plan.settings.get("filters")
    if not asked:
        return ""
    names = ", ".join(step["name"] for step in asked["steps"])
    languages = ", ".join(preparation.job.languages) or "en, as no --language is given"
    return f"; filters: {names} (language: {languages})"


def parts(preparation: Preparation, made: SourceManifest) -> Iterator[Table | str]:
    """What became of a source, in order, each for a line or a table of its own."""
    yield _found(preparation)
    yield _table(made)
    said = made.provenance
    if "dropped" in said:
        yield _dropped(preparation, made)
    if "contamination" in said:
        yield _contaminated(preparation, said["contamination"])
    yield f"held out: {preparation.plan.held_out.reason}"
    yield _rejected(preparation, made)
    for name, seen in said.get("keep", {}).items():
        listed = ", ".join(f"{value}: {count:,}" for value, count in seen.items())
        yield f"{name.replace('_', ' ')} by --keep: {listed or 'none'}"
    if "conversations" in said:
        yield f"last rounds dropped, too long: {said['conversations']['rounds_dropped']:,}"
    yield _lost(**said["characters_lost"])
    yield f"unigram entropy of the train tokens: {made.unigram_entropy:.4f} nats"


def _found(preparation: Preparation) -> Table:
    columns = [Column(name, justify="right") for name in ("files", "bytes")]
    table = Table("what was found", *columns, box=box.SIMPLE)
    for end, (files, size) in preparation.account.ends.items():
        table.add_row(end, f"{files:,}", f"{size:,}")
    return table


def _table(made: SourceManifest) -> Table:
    columns = [Column(name, justify="right") for name in ("train", "held out")]
    table, train, held = Table("", *columns, box=box.SIMPLE), made.train, made.held_out
    what, *numbers = _items(made)
    table.add_row(what, *(f"{number:,}" for number in numbers))
    table.add_row("tokens", f"{train.tokens:,}", f"{held.tokens:,}")
    if chats := made.provenance.get("conversations"):
        trained = chats["trained_tokens"]
        shares = [(trained["train"], train.tokens), (trained["held_out"], held.tokens)]
        table.add_row("trained tokens", *(f"{n:,} ({n / of:.0%})" for n, of in shares))
    table.add_row("bytes of text", f"{train.text_bytes:,}", f"{held.text_bytes:,}")
    table.add_row("shards", f"{len(train.shards):,}", f"{len(held.shards):,}")
    return table


def _rejected(preparation: Preparation, made: SourceManifest) -> str:
    if not made.rejected:
        return "rejected: none"
    first = preparation.reasons.most_common(_REASONS_SHOWN)
    reasons = "; ".join(f"{reason}: {count:,}" for reason, count in first)
    more = "; ..." if len(preparation.reasons) > _REASONS_SHOWN else ""
    path = preparation.directory / "rejected.jsonl"
    return f"rejected: {made.rejected:,} ({reasons}{more}), listed in {path}"


def _dropped(preparation: Preparation, made: SourceManifest) -> str:
    counts, edited = preparation.dropped, made.provenance["edited_by_filters"]
    line = f"documents dropped by filters: {counts.total():,}; edited and kept: {edited:,}"
    each = "".join(f"\n{count:9,} {kind}" for kind, count in counts.most_common())
    look = f"\nlook at some of each: prepare --show-dropped {preparation.directory}"
    return line + each + (look if counts else "")


def _contaminated(preparation: Preparation, found: Mapping) -> str:
    what = "dropped" if found["dropped"] else "kept; --drop-contaminated leaves them out"
    line = f"documents with items of benchmarks: {found['documents']:,}"
    each = "".join(
        f"\n{task['documents']:9,} {name}: {task['items_hit']:,} of {task['items']:,} items"
        for name, task in found["tasks"].items()
        if task["documents"]
    )
    path = preparation.directory / CONTAMINATED_NAME
    return f"{line} ({what}), listed in {path}{each}" if each else line


def _lost(sampled: int, lost: int, most_often: Mapping[str, int]) -> str:
    share = lost / max(sampled, 1)
    if not lost:
        return f"lost by the tokenizer: none of {sampled:,} characters looked at"
    line = f"lost by the tokenizer: {share:.2%} of {sampled:,} characters looked at"
    line += f" ({', '.join(map(repr, most_often))})"
    if share < _LOSS_WARNED_OF:
        return line
    return (
        f"WARNING: {line}: they do not come back from its tokens, and no model trained on them can"
        " write them; take a tokenizer that knows all bytes, such as those of train_tokenizer"
    )
