"""The config of a run: one tree, its rules, the files and flags that fill it.

A config file is Python with `get_config()`, or `get_config(text)` for `--config FILE.py:text`. It
starts from `default_config()`, or from its parent through `load`, and sets what differs. The tree
is locked: a mistyped field is an error, not a new field. Only `data.weights`, whose keys are the
names of the user's sources, takes new keys.
"""

# ruff: noqa: F401
from stablelm_jax.config.access import (
    ConfigError,
    config_changes,
    differing,
    from_dict,
    rounding_changes,
    set_by,
    set_value,
    show_changes,
    to_dict,
)
from stablelm_jax.config.derived import (
    at_step,
    batch_sizes,
    batch_stages,
    largest_step,
    mixture_stages,
    mixture_weights,
    model_config,
    parse_weights,
    profiled_steps,
    sequence_lengths,
    stage_tokens,
    tokens_of_run,
    tokens_per_step,
)
from stablelm_jax.config.reading import (
    config_from_flags,
    define_flags,
    load,
    overrides_from_flags,
    run,
)
from stablelm_jax.config.rules import validate, validate_mesh
from stablelm_jax.config.tree import default_config, flatten
