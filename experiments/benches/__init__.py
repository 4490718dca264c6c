"""Measurements: each figure a ratio against a named peer in the same run."""
