"""Entry points, and how runs are compared and shown: the only floor that knows Hydra and TensorBoard."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {"does_it_pay": "pays", "UserTask": "pays"}
"""The names that scripts import; they load on first use."""

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"experiments has no {name!r}; it has {', '.join(__all__)}, and its modules")
    return getattr(importlib.import_module(f"experiments.{_HOME[name]}"), name)
