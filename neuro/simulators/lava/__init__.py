"""Lava behind a process boundary: the client of the worker, its errors, boards."""
