"""Surprise-gated, sparse-update training of Transformers. The public names load on first use."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Active": "weights.subset",
    "Arm": "loop.assembly",
    "AttachConfig": "library.settings",
    "DataConfig": "data.corpus",
    "Gate": "gates.gate",
    "GateConfig": "gates.config",
    "GateContext": "gates.gate",
    "GrowthConfig": "growth.settings",
    "Mesh": "parallel.mesh",
    "ModelConfig": "transformer",
    "NgramTable": "surprise",
    "Objective": "objectives.objective",
    "OptimConfig": "weights.settings",
    "Optimizer": "weights.optimizer",
    "StepPlan": "step.plan",
    "Stepper": "step.backward",
    "Subset": "weights.subset",
    "SubsetConfig": "weights.subset",
    "Trainer": "loop.trainer",
    "TrainerConfig": "loop.records",
    "Transformer": "transformer",
    "UserTask": "own.task",
    "WindowStream": "data.stream",
    "attach": "library.attach",
    "band": "gates.policies",
    "grow_blocks": "growth.modules",
    "held_out": "data.regimes",
    "load_corpus": "data.corpus",
    "make_gate": "gates.choice",
    "make_stream": "data.regimes",
    "make_trainer": "loop.assembly",
    "masked": "weights.masked",
    "register_policy": "gates.policies",
    "register_signal": "signals",
    "register_source": "data.sources",
    "register_subset_policy": "weights.subset",
    "sparse_step": "step.backward",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"sparse_update has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"sparse_update.{_HOME[name]}"), name)
