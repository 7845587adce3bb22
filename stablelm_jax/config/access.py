"""A config by its dotted keys, as text and as a plain dict."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from ml_collections import ConfigDict

from stablelm_jax.config.tree import default_config

SOURCE_NAME = re.compile(r"[a-z][a-z0-9_]*")


class ConfigError(ValueError):
    """A config that cannot run. Its text is one line: the key, its value, why, and what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every field, by name; a group without fields gives (key, {})."""
    for name in sorted(config.keys()):
        key, value = prefix + name, config[name]
        if isinstance(value, ConfigDict) and len(value):
            yield from flatten(value, key + ".")
        else:
            yield key, {} if isinstance(value, ConfigDict) else value


def get(config: ConfigDict, key: str) -> Any:
    """The value at a dotted key."""
    for name in key.split("."):
        config = config[name]
    return config.to_dict() if isinstance(config, ConfigDict) else config


def field_type(config: ConfigDict, key: str) -> type:
    """The type of the field at a dotted key, also where it is unset."""
    *groups, name = key.split(".")
    for group in groups:
        config = config[group]
    return config.get_type(name)


def unknown_key(key: str, config: ConfigDict | None = None) -> ConfigError:
    """The error for a key that is not in the tree; names the nearest one."""
    known = [known for known, _ in flatten(config if config is not None else default_config())]
    if key.startswith("data.weights."):
        remedy = (
            "a new source is named in the config file or after its name, as in "
            "--config configs/own_text.py:mine=1,other=0.5"
        )
    else:
        remedy = f"did you mean config.{nearest(key, known)}?"
    return ConfigError(f"config.{key}: there is no such field; {remedy}")


def nearest(key: str, known: list[str]) -> str:
    """By the whole dotted key or by its last part, whichever is more alike."""

    def likeness(other: str) -> float:
        whole = difflib.SequenceMatcher(None, key, other).ratio()
        last = difflib.SequenceMatcher(None, key.split(".")[-1], other.split(".")[-1]).ratio()
        return max(whole, last) + 0.1 * whole

    return max(known, key=likeness)


def to_text(config: ConfigDict) -> str:
    """The resolved config, one `key = value` a line, by name."""
    return "".join(f"{key} = {shown(value)}\n" for key, value in flatten(config))


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Nested plain dict that JSON can hold: tuples as lists, unset fields as None."""
    return json.loads(json.dumps(config.to_dict()))


def from_dict(tree: Mapping[str, Any]) -> ConfigDict:
    """The inverse of `to_dict`. A field that `tree` lacks (it is newer) has its default."""
    config = default_config()
    for key, value in _flatten_dict(tree):
        if key != "data.weights":
            set_value(config, key, value)
    return config


def _flatten_dict(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten_dict(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def set_value(config: ConfigDict, key: str, value: Any) -> None:
    """Sets the field at a dotted key; `ConfigError` for an unknown key or a wrong type."""
    *groups, name = key.split(".")
    try:
        group = config
        for part in groups:
            group = group[part]
        group[name] = tuple(value) if isinstance(value, list) else value
    except (KeyError, AttributeError):
        raise unknown_key(key, config) from None
    except TypeError:
        kind = field_type(config, key).__name__
        raise ConfigError(
            f"config.{key}={value!r}: is of type {type(value).__name__}; "
            f"give a value of type {kind}"
        ) from None


def set_by(config: ConfigDict, overrides: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> 'command line' | 'file' | 'default' (also where a file repeats the default)."""
    defaults = dict(flatten(default_config()))

    def origin(key: str, value: Any) -> str:
        if any(key == given or key.startswith(given + ".") for given in overrides):
            return "command line"
        return "default" if key in defaults and defaults[key] == value else "file"

    return {key: origin(key, value) for key, value in flatten(config)}


def refuse(config: ConfigDict, key: str, why: str, remedy: str) -> NoReturn:
    """Raises the `ConfigError` of one field."""
    raise ConfigError(f"config.{key}={shown(get(config, key))}: {why}; {remedy}")


def shown(value: Any) -> str:
    return "not set" if value is None else repr(value)
