"""Pages made from the code: every field of the config, every flag of the verbs."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stablelm_jax.__main__ import VERBS
from stablelm_jax.config import tree
from stablelm_jax.model.config import ModelConfig

ROOT = Path(__file__).parents[2]

OPTIONS = """# Options

    --config.training.num_steps=2000 --config.data.weights.code=0.5

Every field of a run's config, made from `stablelm_jax/config/tree.py` as this page is built. A
config file sets some, the command line any (`--config.group.field=value`; `none` unsets one that
may be unset), and `config.json` in the run's folder says what each is and where it was set. An
unknown name, a value out of range or fields that do not go together are one line and exit code 2.
"""

COMMANDS = """# Commands

Every command is `python -m stablelm_jax.VERB`, and `stablelm VERB` once installed; what follows is
what each says to `--help`. Verbs with `--config` take every [option](options.md) as
`--config.group.field=value`.
"""


def options_page() -> str:
    """A section for each group of the tree, in its order, and a heading for each field."""
    comments = field_comments()
    parts = [OPTIONS, "## The run\n"]
    for name, entry in tree.TREE.items():
        if isinstance(entry, tree.Field):
            parts.append(_about_field(name, entry, comments))
            continue
        parts.append(f"## {name}\n\n{_sentence(comments.get(name, ''))}\n")
        parts += [_about_field(f"{name}.{key}", field, comments) for key, field in entry.items()]
    return "\n".join(parts)


def _about_field(key: str, field: tree.Field | dict, comments: dict[str, str]) -> str:
    lines = [_sentence(comments.get(key, "")), ""]
    if isinstance(field, dict):  # names that a run gives, such as those of sources
        key = f"{key}.NAME"
        lines[1] = "A number each; none by default."
    elif isinstance(field.default, type):
        lines[1] = f"{_allowed(field)}; {'unset by default' if field.optional else 'must be set'}."
    else:
        default = f"`{field.default!r}`" if field.default not in ("", ()) else "empty"
        lines[1] = f"{_allowed(field)}; {default} by default."
    words = " ".join(line[:1].upper() + line[1:] for line in lines if line)
    return f"#### `{key}` {{ #{key} }}\n\n{words}\n"


def _sentence(comment: str) -> str:
    comment = comment[:1].upper() + comment[1:]
    return comment if not comment or comment.endswith(".") else f"{comment}."


def _allowed(field: tree.Field) -> str:
    """Type, range and choices in a few words."""
    if choices := field.choices() if callable(field.choices) else field.choices:
        return " or ".join(f"`{choice}`" for choice in choices)
    words = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    ends = [
        (field.least, "from {}", float("-inf")),
        (field.above, "above {}", float("-inf")),
        (field.most, "to {}", float("inf")),
        (field.below, "below {}", float("inf")),
    ]
    bounds = [text.format(end) for end, text, none in ends if end != none]
    return " ".join([words.get(field.type, "list of texts"), *bounds])


def field_comments() -> dict[str, str]:
    """{dotted name of a field or group: its comments}, those of the model's fields too."""
    source = Path(tree.__file__).read_text(encoding="utf-8")
    found = dict(_entries(_assigned(ast.parse(source), "TREE"), "", _comments(source)))
    source = Path(sys.modules[ModelConfig.__module__].__file__).read_text(encoding="utf-8")
    (model,) = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == ModelConfig.__name__
    ]
    own, above = _comments(source)
    for node in model.body:
        if isinstance(node, ast.AnnAssign):
            found[f"model.{node.target.id}"] = _of_lines(node.lineno, node.end_lineno, own, above)
    return found


def _assigned(module: ast.Module, name: str) -> ast.Dict:
    """The dict that is given this name at the top of a module."""
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node.value
    raise ValueError(f"no {name} = {{...}} there")


def _entries(node: ast.Dict, prefix: str, comments) -> Iterator[tuple[str, str]]:
    """(dotted name, comment) of what a dict in the source holds, groups included."""
    for key, value in zip(node.keys, node.values, strict=True):
        name = prefix + key.value
        is_group = isinstance(value, ast.Dict) and value.keys
        last = key.lineno if is_group else value.end_lineno
        yield name, _of_lines(key.lineno, last, *comments)
        if is_group:
            yield from _entries(value, f"{name}.", comments)


def _comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """{line: comment} of those behind code, and of those with a line of their own."""
    behind, alone = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            where = alone if token.line.lstrip().startswith("#") else behind
            where[token.start[0]] = token.string.lstrip("# ")
    return behind, alone


def _of_lines(first: int, last: int, behind: dict[int, str], alone: dict[int, str]) -> str:
    """The comment lines right above, and what stands behind the lines themselves."""
    above = first
    while above - 1 in alone:
        above -= 1
    lines = [alone[line] for line in range(above, first)]
    return " ".join(lines + [behind[line] for line in range(first, last + 1) if line in behind])


def commands_page() -> str:
    """What every verb says to --help, and every command that a verb has."""
    with ThreadPoolExecutor() as pool:
        texts = dict(zip(VERBS, pool.map(help_of, VERBS), strict=True))
    parts = [COMMANDS]
    for verb, purpose in VERBS.items():
        parts.append(f"## {verb}\n\n{purpose[:1].upper()}{purpose[1:]}.\n\n{_block(texts[verb])}")
        for command in _commands_of(texts[verb]):
            parts.append(f"### {verb} {command}\n\n{_block(help_of(verb, command))}")
    return "\n".join(parts)


def help_of(verb: str, *command: str) -> str:
    """What a verb prints, without the path of this checkout, in lines of 80 characters."""
    done = subprocess.run(
        [sys.executable, "-m", f"stablelm_jax.{verb}", *command, "--help"],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "80"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if done.returncode:
        raise RuntimeError(f"{verb} --help ended with {done.returncode}: {done.stderr}")
    return done.stdout.replace(f"{ROOT}/", "").strip()


def _commands_of(text: str) -> list[str]:
    """Those that argparse lists as {from-hf,to-hf} at the end of the usage."""
    usage = text.partition("\n\n")[0]
    _, _, listed = usage.partition("] {")
    return listed.partition("}")[0].split(",") if listed.rstrip().endswith("...") else []


def _block(text: str) -> str:
    return f"```text\n{text}\n```\n"
