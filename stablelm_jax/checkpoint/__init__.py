"""Checkpoints: `global_step<N>` folders of three items, with a checksum for every leaf."""
