"""Pretraining: state, gradient, step, loop, metrics and the run folder."""
