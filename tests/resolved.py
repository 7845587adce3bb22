"""A whole config that lies in a file, as `--config .../resolved.py:FILE.json` takes it."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from stablelm_jax import config as config_lib


def get_config(path: str) -> ConfigDict:
    """The config that `config_lib.to_dict` wrote to `path`."""
    return config_lib.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
