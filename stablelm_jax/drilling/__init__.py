"""Kills and stops a training at chosen moments, and compares it with one that was left alone."""
