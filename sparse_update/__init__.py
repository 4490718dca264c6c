"""Surprise-gated, sparse-update training of Transformers. The public names load on first use."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Active": "subset",
    "GateConfig": "gate",
    "ModelConfig": "transformer",
    "NgramTable": "surprise",
    "OptimConfig": "optimizer",
    "Optimizer": "optimizer",
    "SequenceGate": "gate",
    "SubsetConfig": "subset",
    "TokenGate": "gate",
    "Trainer": "trainer",
    "TrainerConfig": "trainer",
    "Transformer": "transformer",
    "WindowStream": "stream",
    "band": "gate",
    "load_corpus": "corpus",
    "sparse_step": "backward",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"sparse_update has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"sparse_update.{_HOME[name]}"), name)
