"""`--filters`: which filters a source goes through, as they are asked for and as they are kept.

    gopher, c4(filter_no_terminal_punct=False), language(threshold=0.8)

Each is a class of datatrove's, or of anybody's that is made like them (package.module.Class), and
its parameters are those of its constructor.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.metadata
import inspect
import json
from collections.abc import Iterator, Sequence
from typing import Any

FILTERS = {
    "gopher_repetition": "datatrove.pipeline.filters.GopherRepetitionFilter",
    "gopher_quality": "datatrove.pipeline.filters.GopherQualityFilter",
    "c4": "datatrove.pipeline.filters.C4QualityFilter",
    "c4_paragraphs": "datatrove.pipeline.filters.C4ParagraphFilter",
    "fineweb": "datatrove.pipeline.filters.FineWebQualityFilter",
    "language": "stablelm_jax.preparation.screening.LanguageFilter",
}
# Names for several. `fineweb_recipe` is what datatrove's examples/fineweb.py does between the
# extraction of the text and the search for near copies, in its order.
SEVERAL = {
    "gopher": "gopher_repetition, gopher_quality",
    "fineweb_recipe": "language, gopher, c4(filter_no_terminal_punct=False), fineweb",
}
# Gopher's rule asks for two of eight English words, which datatrove has. These are eight of the
# most frequent words of each language; of other languages spaCy's lists are taken.
STOP_WORDS = {
    "de": "der die und zu von mit ist das",
    "en": "the be to of and that have with",
    "es": "el de y que en con los es",
    "fr": "le de et que les avec est à",
    "it": "il di e che la con è per",
    "nl": "de het en van te met dat is",
    "pt": "o de e que do com é para",
}
_JUDGES = {"datatrove", "spacy", "py3langid"}
_OF_PIPELINES = {"exclusion_writer", "batch_size"}  # parameters that mean nothing here
_CONSTANTS = {"true": True, "false": False, "none": None}
# A bool is an int to Python, so it comes first.
_KINDS = {"True or False": bool, "a number": (int, float), "a text": str, "a list": (list, tuple)}


class FilterError(ValueError):
    """Filters that cannot be used; the message says why, and what there is."""


def in_full(asked: Sequence[str], languages: Sequence[str]) -> dict[str, Any]:
    """What `--filters` asks for, with every parameter, as JSON; {} where it asks for none.

    Args:
      languages: ISO 639-1 codes of the source; it is English where there are none.

    Returns:
      `steps`, in order, the name and parameters of each; and the versions of what judges.

    Raises:
      FilterError: unknown filters or parameters, or values that do not fit.
    """
    steps = [
        {"name": name, "parameters": _parameters(name, given, list(languages) or ["en"])}
        for name, given in _calls(", ".join(filter(None, (part.strip(" ,") for part in asked))))
    ]
    if not steps:
        return {}
    installed = importlib.metadata.distributions()
    return {
        "steps": steps,
        "versions": {each.name: each.version for each in installed if each.name in _JUDGES},
    }


def build(step: dict[str, Any]) -> Any:
    """The filter of one of the `steps`."""
    values = step["parameters"].items()
    return _class(step["name"])(
        **{key: tuple(v) if isinstance(v, list) else v for key, v in values}
    )


def _calls(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and given parameters of each filter, of several for a name that stands for them."""
    if not text:
        return
    try:
        # As it was typed: brackets around it would stand in the messages.
        tree = ast.parse(text, mode="eval").body
        calls = [
            node if isinstance(node, ast.Call) else ast.Call(node, [], [])
            for node in (tree.elts if isinstance(tree, ast.Tuple) else [tree])
        ]
        if any(call.args for call in calls):
            raise ValueError("a parameter without its name")
        found = [
            (ast.unparse(call.func), {word.arg: _value(word.value) for word in call.keywords})
            for call in calls
        ]
    except (SyntaxError, ValueError, AttributeError) as error:
        raise FilterError(
            f"--filters {text}: not understood ({getattr(error, 'msg', error)}); write for example"
            " --filters gopher"
            " 'c4(min_num_sentences=3)' 'language(backend=ft176, model=\"a file\")'"
        ) from error
    for name, given in found:
        if name not in SEVERAL:
            yield name, given
        elif not given:
            yield from _calls(SEVERAL[name])
        else:
            raise FilterError(f"--filters {name}: give its filters parameters: {SEVERAL[name]}")


def _value(node: ast.expr) -> Any:
    """A number, a text (quotes may be left out around a word), True, False, None, or a list."""
    if isinstance(node, ast.Name):
        return _CONSTANTS.get(node.id.lower(), node.id)
    if isinstance(node, ast.List | ast.Tuple):
        return list(map(_value, node.elts))
    value = ast.literal_eval(node)
    json.dumps(value, allow_nan=False)
    return value


def _imported(name: str, path: str) -> Any:
    module, _, attribute = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module of anybody's may raise what it likes
        problem = f"{error}; is its package on PYTHONPATH?"
        if name == "recipe":
            problem = "only with --recipe, and alone"
        elif not module:
            problem = f"unknown{_near(name, [*FILTERS, *SEVERAL])}, or your package.module.Class"
        raise FilterError(f"--filters {name}: {problem}") from error


def _class(name: str) -> Any:
    found = _imported(name, FILTERS.get(name, name))
    if not (isinstance(found, type) and hasattr(found, "filter")):
        raise FilterError(f"--filters {name}: is no class with filter(document)")
    return found


def _kind(value: Any) -> str | None:
    return next((kind for kind, types in _KINDS.items() if isinstance(value, types)), None)


def _near(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    return (f", perhaps {near[0]!r}" if near else "") + f"; there are {', '.join(names) or 'none'}"


def _parameters(name: str, given: dict[str, Any], languages: list[str]) -> dict[str, Any]:
    """Every parameter with what is given for it, what follows from the language, or its default."""
    kinds = inspect.signature(_class(name)).parameters.values()
    named = [kind for kind in kinds if kind.kind in (kind.POSITIONAL_OR_KEYWORD, kind.KEYWORD_ONLY)]
    defaults = {kind.name: kind.default for kind in named if kind.name not in _OF_PIPELINES}
    found, problem = {**defaults, **given}, ""
    for key, value in found.items():
        if key not in defaults:
            problem = f"no parameter {key!r}{_near(str(key), list(defaults))}"
        elif value is inspect.Parameter.empty:
            problem = f"give {key}=..."
        elif value is not None and _kind(defaults[key]) not in (None, _kind(value)):
            problem = f"{key}={value!r}: takes {_kind(defaults[key])}, such as {defaults[key]!r}"
        elif key == "language" and key not in given and len(languages) > 1:
            problem = f"it judges one language: write {name}(language={languages[0]})"
        if problem:
            raise FilterError(f"--filters {name}: {problem}")
    of_source = {"languages": languages, "language": languages[0]}
    found |= {key: of_source[key] for key in of_source.keys() & found if not given.get(key)}
    if found.get("min_stop_words") and not found.get("stop_words", True):
        found["stop_words"] = _stop_words(name, found["language"])
    return json.loads(json.dumps(found))


def _stop_words(name: str, language: str) -> list[str]:
    if language in STOP_WORDS:
        return STOP_WORDS[language].split()
    try:
        return sorted(_imported(name, f"spacy.lang.{language}.stop_words.STOP_WORDS"))
    except FilterError as error:
        raise FilterError(
            f"--filters {name}: no stop words of the language {language!r} ({error.__cause__}):"
            " give its ISO 639-1 code, or stop_words=[one, two, three]"
        ) from error
