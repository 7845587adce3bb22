"""Stable LM 2 in JAX: from raw text to a released language model."""

__version__ = "0.1.0"
