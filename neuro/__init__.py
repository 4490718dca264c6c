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
    from neuro.conversion.graded import GradedConfig
    from neuro.conversion.norm import rms_norm_graph
    from neuro.conversion.plan import Plan, Segment, load_plan, save_plan
    from neuro.conversion.rate import RateConfig
    from neuro.conversion.routes import convert
    from neuro.conversion.sigma_delta import SigmaDeltaConfig
    from neuro.deployed import Deployed, deploy, load_deployed, save_deployed
    from neuro.generation import generate
    from neuro.graph import Population, Projection, SpikingGraph, load_graph, save_graph
    from neuro.registry import LayerRule, prepare, register_layer, unregister_layer
    from neuro.thresholds import EventThreshold
    from neuro.training.insert import insert_thresholds
    from neuro.training.loop import TrainSettings, fine_tune

_HOME = {
    "analyse": "neuro.compatibility",
    "CompatibilityReport": "neuro.compatibility",
    "NothingToMap": "neuro.compatibility",
    "calibrate": "neuro.calibration",
    "Calibration": "neuro.calibration",
    "convert": "neuro.conversion.routes",
    "RateConfig": "neuro.conversion.rate",
    "SigmaDeltaConfig": "neuro.conversion.sigma_delta",
    "GradedConfig": "neuro.conversion.graded",
    "split_attention": "neuro.conversion.attention",
    "Plan": "neuro.conversion.plan",
    "Segment": "neuro.conversion.plan",
    "save_plan": "neuro.conversion.plan",
    "load_plan": "neuro.conversion.plan",
    "deploy": "neuro.deployed",
    "save_deployed": "neuro.deployed",
    "load_deployed": "neuro.deployed",
    "Deployed": "neuro.deployed",
    "generate": "neuro.generation",
    "Population": "neuro.graph",
    "Projection": "neuro.graph",
    "SpikingGraph": "neuro.graph",
    "save_graph": "neuro.graph",
    "load_graph": "neuro.graph",
    "LayerRule": "neuro.registry",
    "prepare": "neuro.registry",
    "register_layer": "neuro.registry",
    "unregister_layer": "neuro.registry",
    "rms_norm_graph": "neuro.conversion.norm",
    "EventThreshold": "neuro.thresholds",
    "insert_thresholds": "neuro.training.insert",
    "fine_tune": "neuro.training.loop",
    "TrainSettings": "neuro.training.loop",
}

__all__ = [
    "Calibration",
    "CompatibilityReport",
    "Deployed",
    "EventThreshold",
    "GradedConfig",
    "LayerRule",
    "NothingToMap",
    "Plan",
    "Population",
    "Projection",
    "RateConfig",
    "Segment",
    "SigmaDeltaConfig",
    "SpikingGraph",
    "TrainSettings",
    "analyse",
    "calibrate",
    "convert",
    "deploy",
    "fine_tune",
    "generate",
    "insert_thresholds",
    "load_deployed",
    "load_graph",
    "load_plan",
    "prepare",
    "register_layer",
    "rms_norm_graph",
    "save_deployed",
    "save_graph",
    "save_plan",
    "split_attention",
    "unregister_layer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'neuro' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
