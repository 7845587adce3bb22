"""Continuing text: a copy of the weights for decoding, a cache of keys and values, sampling."""
