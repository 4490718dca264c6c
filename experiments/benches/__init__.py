"""Speeds and costs beside a named peer: each figure is a ratio of one run."""
