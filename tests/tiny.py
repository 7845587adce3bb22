"""A small tokenizer, two small sources and a small run for the tests that train."""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path
from unittest import mock

import numpy as np
import resolved
from small_models import random_params, write_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers

from stablelm_jax import config as config_lib
from stablelm_jax.data.manifest import (
    SourceManifest,
    Split,
    TokenizerInfo,
    unigram_entropy,
    write_manifest,
)
from stablelm_jax.data.shards import ShardWriter
from stablelm_jax.reporting import page
from stablelm_jax.reporting import picture as pictures
from stablelm_jax.tokenizer.tokenizer import load_tokenizer
from stablelm_jax.training import programs, update_guard
from stablelm_jax.training.begin import ResumeOptions
from stablelm_jax.training.run import run_training
from stablelm_jax.training.setup import Run

VOCAB = 120
SOURCES = ("fibonacci", "squares")
# Of `write_chats`: a source of conversations and one of preference pairs, and their template.
TALKS, CHOICES = "talks", "choices"
CHAT = {
    "name": "tiny",
    "jinja": "{% for message in messages %}{{ message['content'] }} {% endfor %}",
    "enders": ["<|endoftext|>"],
}


def write_tokenizer(path: Path) -> Path:
    """A word-level tokenizer of the words w0 .. w110 and `<|endoftext|>`."""
    words = {f"w{i}": i for i in range(VOCAB - 9)} | {"<unk>": VOCAB - 9}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path))
    return path


def write_data(root: Path, seed: int = 0) -> Path:
    """`root/tokenizer.json` and `root/<source>/`: documents with a pattern a model can learn."""
    root.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(write_tokenizer(root / "tokenizer.json"))
    rng = np.random.default_rng(seed)
    for number, name in enumerate(SOURCES):
        _write_source(root / name, name, tokenizer, rng, step=number + 2)
    return root


def _write_source(folder: Path, name: str, tokenizer, rng, step: int) -> None:
    folder.mkdir()
    splits, counts = {}, np.zeros(tokenizer.vocab_size, np.int64)
    for split, documents in (("train", 120), ("held_out", 8)):
        with ShardWriter(folder / f"{split}-00000") as writer:
            for _ in range(documents):
                length, start = rng.integers(5, 60), rng.integers(0, VOCAB - 9)
                words = (start + step * np.arange(length)) % (VOCAB - 9)
                document = np.append(words, tokenizer.eod).astype(np.int32)
                writer.add_many(document, [len(document)])
                if split == "train":
                    counts += np.bincount(document, minlength=len(counts))
            info = writer.close()
        splits[split] = Split.of([info], text_bytes=4 * info.tokens)
    made_by = TokenizerInfo("tiny", tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod)
    write_manifest(
        folder,
        SourceManifest(
            source=name, tokenizer=made_by, unigram_entropy=unigram_entropy(counts), **splits
        ),
    )


def write_chats(root: Path, seed: int = 0, items: int = 50) -> Path:
    """`root/talks` and `root/choices`, beside a tokenizer: prompts of words, answers that count on.

    A good answer rises from the last word of its prompt, a rejected one falls. Documents are short:
    rows of 32 tokens hold one to three pairs. `items`: conversations, and pairs, to train on.
    """
    root.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(write_tokenizer(root / "tokenizer.json"))
    rng = np.random.default_rng(seed)

    def side(prompt, step):
        answer = (prompt[-1] + step * np.arange(1, rng.integers(3, 7))) % (VOCAB - 9)
        return [*prompt, *answer, tokenizer.eod], [(len(prompt), len(prompt) + len(answer) + 1)]

    def talk():
        first, spans = side(rng.integers(0, VOCAB - 9, 3), 1)
        if rng.random() < 0.5:  # another round
            second, (span,) = side(rng.integers(0, VOCAB - 9, 2), 1)
            first, spans = first + second, [*spans, tuple(len(first) + place for place in span)]
        return [(first, spans)]

    def choice():
        prompt = rng.integers(0, VOCAB - 9, rng.integers(2, 4))
        return [side(prompt, 1), side(prompt, -1)]

    for name, kind, make in ((TALKS, "conversations", talk), (CHOICES, "pairs", choice)):
        _write_chat_source(root / name, kind, tokenizer, make, items)
    return root


def write_parent(path: Path, root: Path) -> Path:
    """A checkpoint of random weights, biases and norms too, for runs of `tiny_config(root)`."""
    model = config_lib.model_config(tiny_config(root))
    return write_checkpoint(path, model, random_params(model), root / "tokenizer.json")


def _write_chat_source(folder: Path, kind: str, tokenizer, make, items: int) -> None:
    """A source of two train shards and a held-out one; `make()` gives an item's documents."""
    folder.mkdir()
    infos = []
    first = items * 3 // 5
    counts = {"train-00000": first, "train-00001": items - first, "held_out-00000": 9}
    for shard, count in counts.items():
        with ShardWriter(folder / shard) as writer:
            for _ in range(count):
                for ids, spans in make():
                    marked = np.array([(0, *span) for span in spans], np.int32)
                    writer.add_many(np.array(ids, np.int32), [len(ids)], marked)
        infos.append(writer.close())
    splits = {"train": infos[:2], "held_out": infos[2:]}
    manifest = SourceManifest(
        source=folder.name,
        tokenizer=TokenizerInfo("tiny", tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod),
        unigram_entropy=4.0,
        kind=kind,
        chat=CHAT,
        **{name: Split.of(of, 4 * sum(i.tokens for i in of)) for name, of in splits.items()},
    )
    write_manifest(folder, manifest)


def tiny_config(root: Path, sources=(), **overrides):
    """A run of 12 steps on `root`; `sources`: others, with weights; `overrides` by dotted key."""
    config = config_lib.default_config()
    values = {
        "name": "tiny",
        "model.vocab_size": load_tokenizer(root / "tokenizer.json").vocab_size,
        "model.num_layers": 2,
        "model.width": 64,
        "model.num_heads": 4,
        "model.num_kv_heads": 4,
        "model.feed_forward_width": 64,
        "model.rotary_fraction": 0.5,
        "data.root": str(root),
        "data.tokenizer": str(root / "tokenizer.json"),
        "data.sequence_length": 32,
        "data.batch_size": 8,
        "schedule.peak": 1e-2,
        "schedule.minimum": 1e-3,
        "schedule.warmup_steps": 2,
        "schedule.total_steps": 40,
        "training.num_steps": 12,
        "training.dtype": "float32",
        "training.log_every": 1,
        "checkpoint.every": 4,
        "evaluation.every": 6,
        "samples.every": 12,
        "samples.prompts": ("w1 w3",),
        "samples.max_new_tokens": 4,
    }
    for key, value in {**values, **overrides}.items():
        config_lib.set_value(config, key, value)
    for name, weight in dict(sources or zip(SOURCES, (0.75, 0.25))).items():
        config.data.weights[name] = weight
    return config


def bare_config(root: Path, **overrides):
    """`tiny_config` that neither evaluates nor samples."""
    return tiny_config(root, **{"evaluation.every": 0, "samples.every": 0, **overrides})


def write_config(config, folder: Path) -> str:
    """What follows `--config=` for a process that is to have this config."""
    path = folder / "config.json"
    path.write_text(json.dumps(config_lib.to_dict(config)))
    return f"{resolved.__file__}:{path}"


# Fields that say nothing about the train step. Any other, and any new one, tells programs apart.
_OF_THE_LOOP = (
    *("branch.", "checkpoint.", "evaluation.", "samples.", "writers.", "report.", "name"),
    *("training.num_steps", "training.log_every", "training.hang_seconds"),
    "training.layer_norms_every",
)
_compiled: dict[tuple, object] = {}
_compile = {name: getattr(programs, name) for name in ("compile_step", "compile_eval_step")}


def compiled_once(name: str, run: Run):
    """As the function of this name in `programs`, but equal runs of this process share one program.

    A test that alters what is compiled calls `run_training` itself; `update_guard.is_spike` may
    be replaced.
    """
    fields = config_lib.flatten(run.config)
    kept = repr([(key, value) for key, value in fields if not key.startswith(_OF_THE_LOOP)])
    key = (name, kept, run.mesh, len(run.sources), run.num_pairs, update_guard.is_spike)
    if key not in _compiled:
        _compiled[key] = _compile[name](run)
    return _compiled[key]


def train(config, workdir: Path, picture: bool = False, options=ResumeOptions()):
    """Trains in this process; returns the exit code and the metrics lines.

    `picture`: also writes loss.png and report.html, which takes as long as so small a run.
    """
    with contextlib.ExitStack() as patched:
        for name in _compile:
            once = functools.partial(compiled_once, name)
            patched.enter_context(mock.patch.object(programs, name, once))
        if not picture:
            patched.enter_context(mock.patch.object(pictures, "draw_losses"))
            patched.enter_context(mock.patch.object(page, "write_page"))
        code = run_training(config, config_lib.set_by(config, {}), str(workdir), options)
    return code, metrics(workdir)


def metrics(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir: Path, kind: str) -> list[dict]:
    """The events of one kind, oldest first."""
    path = workdir / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if line["event"] == kind]


def losses(lines: list[dict]) -> dict[int, float]:
    """{step: training loss}."""
    return {line["step"]: line["loss"] for line in lines if "loss" in line}
