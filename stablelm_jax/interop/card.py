"""The model card of an export: what the weights are and where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stablelm_jax import __version__
from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.model.parameters import count_parameters

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- stablelm
- stablelm_jax
---

# {{ config.name or "StableLM" }} {{ revision }}

A StableLM with {{ "{:,}".format(parameters) }} parameters: {{ model.num_layers }} layers of width \
{{ model.width }}, {{ model.num_heads }} heads\
{% if model.num_kv_heads != model.num_heads %} sharing {{ model.num_kv_heads }} key and value heads\
{% endif %}, {{ "parallel" if model.parallel_residual else "sequential" }} residual, \
{{ "{:,}".format(model.vocab_size) }} rows of vocabulary, \
{{ "{:,}".format(checkpoint.max_positions) }} tokens of context. Weights in {{ dtype }}.
{% if checkpoint.num_valid_ids %}

Its training left ids from {{ "{:,}".format(checkpoint.num_valid_ids) }} on, which stand for \
nothing, out of the softmax: keep them from being generated (`suppress_tokens`).
{% endif %}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "."  # this directory, or a name on the Hub with revision="{{ revision }}"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
inputs = tokenizer("The weather is always wonderful", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```
{% if checkpoint.chat_template is not none %}

It is a chat model: `tokenizer.apply_chat_template` writes its turns.
{% endif %}
{% for title, header, rows in tables %}

## {{ title }}

| {{ header | join(" | ") }} |
| {{ (["---"] * (header | length)) | join(" | ") }} |
{% for row in rows %}
| {{ row | join(" | ") }} |
{% endfor %}
{% endfor %}
"""


def model_card(checkpoint: SavedModel, dtype: str, revision: str) -> str:
    """README.md of a Hugging Face directory: front matter, use, recipe, data, origin."""
    import jinja2

    run = checkpoint.run
    tables = [
        ("Training", ("", ""), _recipe(run)),
        ("Data", ("source", "tokens seen", "share"), _data(run)),
        ("Origin", ("", ""), _origin(checkpoint)),
    ]
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True)
    return environment.from_string(_CARD).render(
        checkpoint=checkpoint,
        model=checkpoint.model,
        parameters=count_parameters(checkpoint.model),
        config=run.get("config", {}),
        dtype=dtype,
        revision=revision,
        tables=[table for table in tables if table[2]],
    )


def _recipe(run: Mapping[str, Any]) -> list[tuple[str, ...]]:
    config = run.get("config")
    if config is None:
        return []
    return [
        ("step", f"{run['step']:,}"),
        ("tokens a step", f"{config['data']['batch_size'] * config['data']['sequence_length']:,}"),
        ("tokens seen", f"{sum(run['tokens'].values()):,}"),
        ("schedule", _group(config["schedule"])),
        ("optimizer", _group(config["optimizer"])),
        ("compute type", config["training"]["dtype"]),
        ("seed", config["seed"]),
    ]


def _group(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in values.items()
        if value is not None
    )


def _data(run: Mapping[str, Any]) -> list[tuple[str, ...]]:
    seen = run.get("tokens", {})
    total = sum(seen.values())
    return [
        (f"`{name}`", f"{tokens:,}", f"{tokens / total:.2%}" if total else "")
        for name, tokens in seen.items()
    ]


def _origin(checkpoint: SavedModel) -> list[tuple[str, str]]:
    run = checkpoint.run
    parent = run.get("origin", {}).get("parent")
    rows = [
        ("checkpoint", f"`{checkpoint.name}`"),
        ("weights from", "imported" in run and f"`{run['imported']['from']}`"),
        ("branch of", parent and f"`{parent.rstrip('/').rsplit('/', 1)[-1]}`"),
        ("data", "data_hash" in run and f"sha256 `{run['data_hash']}`"),
        ("tokenizer", f"sha256 `{run['tokenizer_sha256']}`"),
        ("trained by commit", run.get("git_commit") and f"`{run['git_commit']}`"),
        ("written by", f"stablelm_jax {__version__}"),
    ]
    return [(name, text) for name, text in rows if text]
