"""A config by its dotted keys, as text and as a plain dict."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from ml_collections import ConfigDict

from stablelm_jax.config.tree import FIELDS, default_config, flatten


class ConfigError(ValueError):
    """A config that cannot run. Its text is one line: the key, its value, why, and what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


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


def unknown_key(key: str) -> ConfigError:
    """The error for a key that is not in the tree; names the nearest one."""
    if key.startswith("data.weights."):
        remedy = (
            "a new source is named in the config file or after its name, as in "
            "--config configs/own_text.py:mine=1,other=0.5"
        )
    else:
        remedy = f"did you mean config.{nearest(key)}?"
    return ConfigError(f"config.{key}: there is no such field; {remedy}")


def nearest(key: str) -> str:
    """The key most like this one, by the whole of it or by its last part."""

    def likeness(other: str) -> float:
        whole = difflib.SequenceMatcher(None, key, other).ratio()
        last = difflib.SequenceMatcher(None, key.split(".")[-1], other.split(".")[-1]).ratio()
        return max(whole, last) + 0.1 * whole

    return max(FIELDS, key=likeness)


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Nested plain dict that JSON can hold: tuples as lists, unset fields as None."""
    return json.loads(json.dumps(config.to_dict()))


def from_dict(tree: Mapping[str, Any]) -> ConfigDict:
    """The inverse of `to_dict`. A field that `tree` lacks (it is newer) has its default."""
    config = default_config()
    for key, value in flatten(tree):
        if key != "data.weights":  # without sources
            set_value(config, key, value)
    return config


def set_value(config: ConfigDict, key: str, value: Any) -> None:
    """Sets the field at a dotted key; `ConfigError` for an unknown key or a wrong type."""
    *groups, name = key.split(".")
    try:
        group = config
        for part in groups:
            group = group[part]
        group[name] = tuple(value) if isinstance(value, list) else value
    except (KeyError, AttributeError):
        raise unknown_key(key) from None
    except TypeError:
        kind, given = field_type(config, key).__name__, type(value).__name__
        raise ConfigError(
            f"config.{key}={value!r}: is of type {given}; give a value of type {kind}"
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
    value = get(config, key)
    shown = "not set" if value is None else repr(value)
    raise ConfigError(f"config.{key}={shown}: {why}; {remedy}")
