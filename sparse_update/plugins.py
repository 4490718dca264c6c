"""Modules of the user's own, imported by name so that what they register can be asked for in settings."""

from __future__ import annotations

import importlib
from collections.abc import Iterable


def import_plugins(key: str, modules: Iterable[str]) -> None:
    """Import each of `modules`. Raises ValueError that names the setting `key`, the module and the reason."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            remedy = "for a file in this folder, put PYTHONPATH=. before the command"
            raise ValueError(f"{key}: {module!r} cannot be imported ({error}); {remedy}") from error
