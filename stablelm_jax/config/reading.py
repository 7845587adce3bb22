"""Where a config comes from: its file, and the command line.

`--config FILE.py[:text]` names the file, `--config.group.field=value` sets a field, and `none`
unsets one that may be unset. A verb calls `define_flags` and then `run(main)`, and `main` begins
with `config_from_flags`. Whatever is wrong with flags or config becomes one line on stderr and exit
code 2.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.config_flags import FlagOrderError

from stablelm_jax.config.access import ConfigError, field_type, get, nearest, set_value
from stablelm_jax.config.rules import validate
from stablelm_jax.config.tree import FIELDS, locked


def load(path: str | os.PathLike) -> ConfigDict:
    """The config of `FILE.py` or `FILE.py:text`; not validated."""
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
            raise ConfigError(f"config file {file}: get_config() returns no config; return one")
        return locked(config)
    except ConfigError:
        raise
    except Exception as error:  # a config file is the user's program: anything may come out of it
        raise ConfigError(f"config file {file}: {_what_failed(file, error)}") from error


def _what_failed(file: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and not os.path.exists(file):
        folder = os.path.dirname(file) or "."
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        files = ", ".join(name for name in names if name.endswith(".py"))
        return f"there is no such file; {folder} holds: {files or 'no config file'}"
    what = f"{type(error).__name__}: {error}"
    if unknown := re.match(r'[\'"]?Key "(\w+)" does not exist and cannot be added', str(error)):
        what = f"there is no field {unknown[1]!r}; did you mean config.{nearest(unknown[1])}?"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    return f"line {lines[-1]}: {what}" if lines else what


class _ConfigFile(flags.ArgumentParser):
    """Reads the file of `--config`, and refuses overrides of fields that it does not have."""

    def parse(self, path: str) -> ConfigDict:
        config = load(path)
        for argument in sys.argv:
            if override := re.match(r"--?(?:no)?config\.([^=]+)", argument):
                field_type(config, override[1])  # raises for an unknown key
        return config


def _or_none(parse: Callable[[Any], Any], text: Any) -> Any:
    """Where a file has set a field that may be unset, `none` on the command line unsets it."""
    return None if str(text).lower() == "none" else parse(text)


def define_flags(required: bool = True) -> None:
    """Defines `--config`."""
    for kind, parser in ((int, flags.IntegerParser()), (float, flags.FloatParser())):
        parser.parse = functools.partial(_or_none, parser.parse)
        config_flags.register_flag_parser_for_type(kind, parser)
    flags.disclaim_key_flags()  # --help lists the flag under the verb that calls this
    config_flags.DEFINE_config_file(
        "config",
        help_string="FILE.py or FILE.py:text; fields after it as --config.group.field=value.",
    )
    flags.FLAGS["config"].parser = _ConfigFile()
    if required:
        flags.mark_flag_as_required("config")


def run(main: Callable[[list[str]], int | None]) -> None:
    """`absl.app.run`; every `ConfigError`, of flags or of `main`, is one line and exit code 2."""
    try:
        app.run(main, flags_parser=_parse)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def config_from_flags(*, data: bool = True) -> ConfigDict:
    """The config that `--config` and its overrides give, locked; `data`: as for `validate`."""
    config = flags.FLAGS.config
    for key, field in FIELDS.items():
        if field.optional and field.type is str and str(get(config, key)).lower() == "none":
            set_value(config, key, None)
    validate(config, data=data)
    return config


def overrides_from_flags() -> dict[str, Any]:
    """Dotted key -> value of each `--config.key=value`, for `set_by`."""
    return dict(config_flags.get_override_values(flags.FLAGS["config"]))


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except SystemExit:
        raise SystemExit(0) from None  # absl exits with 1 after --help
    except Exception as error:  # from the user's file, ml_collections or absl
        raise _explained(error) from None
    if rest[1:]:
        raise ConfigError(f"argument {rest[1]!r}: is no flag; write --flag=value, without spaces")
    return rest


def _explained(error: Exception) -> ConfigError:
    """One line for an error of the flag libraries, with the remedy."""
    cause = error.__context__  # absl wraps what a parser raises
    if isinstance(cause, ConfigError):
        return cause
    if isinstance(error, FlagOrderError):
        return ConfigError(f"{error}; write --config FILE.py first, its fields after it")
    if isinstance(error, flags.UnrecognizedFlagError):
        return ConfigError(f"{error}; see --help, and --config.group.field=value for the config")
    if missing := re.match(r"flag --(\w+)=None: .* must have a value", str(error)):
        example = "configs/smoke.py" if missing[1] == "config" else "VALUE"
        return ConfigError(f"--{missing[1]}: is missing; write --{missing[1]} {example}")
    wrong = re.match(r"flag --config\.([^=]+)=(.*)", str(error), re.DOTALL)
    if not wrong:
        return ConfigError(str(error))
    config, key = flags.FLAGS["config"].value, wrong[1]
    kind, now = field_type(config, key), get(config, key)
    remedy = f"give a value of type {kind.__name__}{'' if now is None else f', like {now!r}'}"
    if kind is ConfigDict:
        remedy = f"set its fields one by one, as in --config.{key}.FIELD=VALUE"
    elif key.startswith("data.weights.") and kind is int:
        remedy = "write the weight as a float in the config file, 1.0 for 1"
    value = wrong[2].removesuffix(f": {cause}")
    return ConfigError(f"config.{key}={value!r}: is of the wrong type; {remedy}")
