"""From a torch module to spikes: what can leave the host, the integer graphs it becomes, and a model that runs on them.

Names are loaded on first use, so that `import neuro` brings in neither torch nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuro.calibration import Calibration, calibrate
    from neuro.compatibility import CompatibilityReport, NothingToMap, analyse
    from neuro.conversion.attention import split_attention
    from neuro.conversion.graded import GradedConfig, convert
    from neuro.conversion.plan import Plan, Segment, load_plan, save_plan
    from neuro.deployed import Deployed, deploy
    from neuro.graph import Population, Projection, SpikingGraph, load_graph, save_graph

_HOME = {
    "analyse": "neuro.compatibility",
    "CompatibilityReport": "neuro.compatibility",
    "NothingToMap": "neuro.compatibility",
    "calibrate": "neuro.calibration",
    "Calibration": "neuro.calibration",
    "convert": "neuro.conversion.graded",
    "GradedConfig": "neuro.conversion.graded",
    "split_attention": "neuro.conversion.attention",
    "Plan": "neuro.conversion.plan",
    "Segment": "neuro.conversion.plan",
    "save_plan": "neuro.conversion.plan",
    "load_plan": "neuro.conversion.plan",
    "deploy": "neuro.deployed",
    "Deployed": "neuro.deployed",
    "Population": "neuro.graph",
    "Projection": "neuro.graph",
    "SpikingGraph": "neuro.graph",
    "save_graph": "neuro.graph",
    "load_graph": "neuro.graph",
}

__all__ = [
    "Calibration",
    "CompatibilityReport",
    "Deployed",
    "GradedConfig",
    "NothingToMap",
    "Plan",
    "Population",
    "Projection",
    "Segment",
    "SpikingGraph",
    "analyse",
    "calibrate",
    "convert",
    "deploy",
    "load_graph",
    "load_plan",
    "save_graph",
    "save_plan",
    "split_attention",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'neuro' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
