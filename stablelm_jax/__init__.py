"""Stable LM 2 in JAX: from raw text to a released language model."""

from pathlib import Path

__version__ = "0.1.0"


def configs_folder() -> Path:
    """The shipped configs: inside the package when installed from a wheel, else beside it."""
    package = Path(__file__).parent
    packed = package / "configs"
    return packed if packed.is_dir() else package.parent / "configs"
