"""The model card of an export: what the weights are and where they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stablelm_jax import __version__
from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.model.parameters import count_parameters


def model_card(checkpoint: SavedModel, dtype: str, revision: str) -> str:
    """README.md of a Hugging Face directory: front matter, use, provenance."""
    run = checkpoint.run
    title = f"{run.get('config', {}).get('name') or 'StableLM'} {revision}"
    sections = [
        _FRONT_MATTER,
        f"# {title}\n",
        _model(checkpoint, dtype),
        _use(checkpoint, revision),
        _recipe(run),
        _data(run),
        _origin(checkpoint),
    ]
    return "\n".join(section for section in sections if section)


_FRONT_MATTER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- stablelm
- stablelm_jax
---
"""


def _model(checkpoint: SavedModel, dtype: str) -> str:
    model = checkpoint.model
    heads = f"{model.num_heads} heads"
    if model.num_kv_heads != model.num_heads:
        heads += f" sharing {model.num_kv_heads} key and value heads"
    residual = "parallel" if model.parallel_residual else "sequential"
    return (
        f"A StableLM with {count_parameters(model):,} parameters: {model.num_layers} layers of "
        f"width {model.width}, {heads}, {residual} residual, {model.vocab_size:,} rows of "
        f"vocabulary, {checkpoint.max_positions:,} tokens of context. Weights in {dtype}.\n"
        + _padding(checkpoint.run)
    )


def _padding(run: Mapping[str, Any]) -> str:
    """What other programs do not know by themselves."""
    valid = run.get("config", {}).get("training", {}).get("num_valid_ids")
    if not valid:
        return ""
    return (
        f"\nIts training left ids from {valid:,} on, which stand for nothing, out of the softmax: "
        "keep them from being generated (`suppress_tokens`).\n"
    )


def _use(checkpoint: SavedModel, revision: str) -> str:
    chat = (
        ""
        if checkpoint.chat_template is None
        else ("\nIt is a chat model: `tokenizer.apply_chat_template` writes its turns.\n")
    )
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "."  # this directory, or a name on the Hub with revision="{revision}"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
inputs = tokenizer("The weather is always wonderful", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```
{chat}"""


def _recipe(run: Mapping[str, Any]) -> str:
    config = run.get("config")
    if config is None:
        return ""
    rows = [
        ("step", f"{run['step']:,}"),
        ("tokens a step", f"{config['data']['batch_size'] * config['data']['sequence_length']:,}"),
        ("tokens seen", f"{sum(run['tokens'].values()):,}"),
        ("schedule", _group(config["schedule"])),
        ("optimizer", _group(config["optimizer"])),
        ("compute type", config["training"]["dtype"]),
        ("seed", config["seed"]),
    ]
    return _table("## Training", ("", ""), rows)


def _group(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
                     for key, value in values.items() if value is not None)  # fmt: skip


def _data(run: Mapping[str, Any]) -> str:
    if not run.get("tokens"):
        return ""
    total = sum(run["tokens"].values())
    rows = [
        (f"`{name}`", f"{tokens:,}", f"{tokens / total:.2%}" if total else "")
        for name, tokens in run["tokens"].items()
    ]
    return _table("## Data", ("source", "tokens seen", "share"), rows)


def _origin(checkpoint: SavedModel) -> str:
    return _table("## DataPosition", ("", ""), list(_origin_rows(checkpoint)))


def _origin_rows(checkpoint: SavedModel) -> Iterator[tuple[str, str]]:
    run = checkpoint.run
    yield "checkpoint", f"`{checkpoint.name}`"
    if "imported" in run:
        yield "weights from", f"`{run['imported']['from']}`"
    parent = run.get("origin", {}).get("parent")
    if parent:
        yield "branch of", f"`{parent.rstrip('/').rsplit('/', 1)[-1]}`"
    if "data_hash" in run:
        yield "data", f"sha256 `{run['data_hash']}`"
    yield "tokenizer", f"sha256 `{run['tokenizer_sha256']}`"
    if run.get("git_commit"):
        yield "trained by commit", f"`{run['git_commit']}`"
    yield "written by", f"stablelm_jax {__version__}"


def _table(title: str, header: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return title + "\n\n" + "".join(f"| {' | '.join(map(str, row))} |\n" for row in lines)
