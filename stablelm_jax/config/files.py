"""Config files: reading one, and what to say when that fails."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import traceback
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from stablelm_jax.config.access import ConfigError, nearest, set_value
from stablelm_jax.config.tree import locked


def load(path: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """The config of `FILE.py` or `FILE.py:text` with `overrides` by dotted key; not validated."""
    file, colon, text = os.fspath(path).partition(":")
    try:
        spec = importlib.util.spec_from_file_location("config_file", file)
        if spec is None:
            raise ConfigError(f"config file {file}: is no Python file; give one with get_config()")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if colon and not inspect.signature(module.get_config).parameters:
            raise ConfigError(f"config {path}: takes no text after the colon; write {file}")
        config = module.get_config(*([text] if colon else []))
        if not isinstance(config, ConfigDict):
            raise ConfigError(
                f"config file {file}: get_config() returns no config; end it with one"
            )
        config = locked(config)
    except ConfigError:
        raise
    except Exception as error:  # a config file is the user's program: anything may come out of it
        raise ConfigError(f"config file {file}: {_what_failed(file, error)}") from error
    for key, value in (overrides or {}).items():
        set_value(config, key, value)
    return config


def _what_failed(file: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and not os.path.exists(file):
        folder = os.path.dirname(file) or "."
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        files = ", ".join(name for name in names if name.endswith(".py"))
        return f"there is no such file; {folder} holds: {files or 'no config file'}"
    new_field = re.match(r'[\'"]?Key "(\w+)" does not exist and cannot be added', str(error))
    if new_field:
        what = f"there is no field {new_field[1]!r}; did you mean config.{nearest(new_field[1])}?"
    else:
        what = f"{type(error).__name__}: {error}"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == file
    ]
    return f"line {lines[-1]}: {what}" if lines else what
