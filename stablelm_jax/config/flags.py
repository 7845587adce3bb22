"""The command line: `--config FILE.py[:text]` and `--config.group.field=value`.

A verb is

    def main():
        config_lib.define_flags()
        flags.DEFINE_string('workdir', ...)
        return config_lib.run(run)   # run(argv) calls config_from_flags()

Whatever is wrong with flags or config becomes one line on stderr and exit code 2.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.config_flags import FlagOrderError

from stablelm_jax.config.access import ConfigError, field_type, flatten, get, unknown_key
from stablelm_jax.config.files import load
from stablelm_jax.config.rules import validate

BAD_CONFIG = 2  # exit code


def define_flags(argv: Sequence[str] | None = None, required: bool = True) -> None:
    """Defines `--config`. `argv`: the command line that will be parsed, if not `sys.argv`."""
    flags.disclaim_key_flags()  # --help lists the flag under the verb that calls this
    config_flags.DEFINE_config_file(
        "config",
        help_string="Config file, FILE.py or FILE.py:text; fields after it as "
        "--config.group.field=value.",
        sys_argv=None if argv is None else list(argv),
    )
    if required:
        flags.mark_flag_as_required("config")


def run(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """`absl.app.run`; every `ConfigError`, of flags or of `main`, is one line and exit code 2."""

    def guarded(args: list[str]) -> int | None:
        try:
            return main(args)
        except ConfigError as error:
            _exit(error)

    app.run(guarded, None if argv is None else list(argv), flags_parser=parse_flags)


def config_from_flags() -> ConfigDict:
    """The config that `--config` and its overrides give, validated and locked."""
    config = flags.FLAGS.config
    validate(config)
    return config


def overrides_from_flags() -> dict[str, Any]:
    """Dotted key -> value of each `--config.key=value`, for `set_by`."""
    return dict(config_flags.get_override_values(flags.FLAGS["config"]))


def parse_flags(argv: Sequence[str]) -> list[str]:
    """The `flags_parser` of `absl.app.run`: parses, or says what is wrong and exits with 2."""
    argv = list(argv)
    try:
        rest = flags.FLAGS(argv)
        config = flags.FLAGS.config
        if not isinstance(config, ConfigDict | None):  # config_flags holds errors of files back
            raise ConfigError("get_config() returned no config")
    except SystemExit:
        raise SystemExit(0) from None  # absl exits with 1 after --help
    except Exception as error:  # out of the user's file, ml_collections or absl
        _exit(_explain(argv, error))
    if rest[1:]:
        _exit(ConfigError(f"argument {rest[1]!r}: is no flag; write --flag=value, without spaces"))
    return rest


def _exit(error: ConfigError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(BAD_CONFIG)


def _explain(argv: list[str], error: Exception) -> ConfigError:
    """The one line for an error of the flag libraries: reads the command line once more."""
    path, overrides = _arguments(argv)
    if isinstance(error, FlagOrderError):
        return ConfigError(f"{error}; write --config FILE.py first, its fields after it")
    if isinstance(error, flags.UnrecognizedFlagError):
        return ConfigError(f"{error}; see --help, and --config.group.field=value for the config")
    missing = re.match(r"flag --(\w+)=None: .* must have a value", str(error))
    if missing:
        example = "configs/smoke.py" if missing[1] == "config" else "VALUE"
        return ConfigError(f"--{missing[1]}: is missing; write --{missing[1]} {example}")
    if path is None:
        return ConfigError(f"{error}; write --config FILE.py first")
    try:
        config = load(path)
    except ConfigError as file_error:
        return file_error
    known = {key for key, _ in flatten(config)}
    groups = {key.rsplit(".", depth)[0] for key in known for depth in (1, 2)}
    for key in overrides:
        if key not in known | groups:
            return unknown_key(key, config)
    for key, value in overrides.items():
        if str(error).startswith(f"flag --config.{key}="):
            return _wrong_type(config, key, value)
    return ConfigError(str(error))


def _wrong_type(config: ConfigDict, key: str, value: str) -> ConfigError:
    kind = field_type(config, key)
    if kind is ConfigDict:
        remedy = f"set its fields one by one, as in --config.{key}.FIELD=VALUE"
    elif key.startswith("data.weights.") and kind is int:
        remedy = "write the weight as a float in the config file, 1.0 for 1"
    else:
        now = get(config, key)
        remedy = f"give a value of type {kind.__name__}" + (
            "" if now is None else f", like {now!r}"
        )
    return ConfigError(f"config.{key}={value!r}: is of the wrong type; {remedy}")


def _arguments(argv: list[str]) -> tuple[str | None, dict[str, str]]:
    """The file of `--config` and the text of each override, in either spelling of a flag."""
    path, overrides = None, {}
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        flag = re.fullmatch(r"--?(?:no)?config(?:\.([^=]+))?(?:=(.*))?", argument, re.DOTALL)
        if not flag:
            continue
        key, value = flag[1], following if flag[2] is None else flag[2]
        if key is None:
            path = value
        else:
            overrides[key] = value
    return path, overrides
