"""From a torch module to spikes: what can leave the host, the integer graphs it becomes, and a model that runs on them.

Names are loaded on first use, so that `import neuro` brings in neither torch nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuro.accounting.account import GraphAccount, graph_account
    from neuro.analysis.compatibility import CompatibilityReport, NothingToMap, analyse
    from neuro.analysis.preparation import prepare
    from neuro.analysis.registry import LayerRule, register_layer, unregister_layer
    from neuro.conversion.calibration import Calibration, calibrate
    from neuro.conversion.graded import GradedConfig
    from neuro.conversion.norm import rms_norm_graph
    from neuro.conversion.plan import LostLayer, Plan, Segment, load_plan, save_plan
    from neuro.conversion.rate import RateConfig
    from neuro.conversion.routes import convert
    from neuro.conversion.sigma_delta import SigmaDeltaConfig
    from neuro.conversion.spiking.convert import convert_spiking
    from neuro.conversion.spiking.describing import describe
    from neuro.conversion.spiking.xylo.convert import to_xylo
    from neuro.deployment.deployed import Deployed, deploy, load_deployed, save_deployed
    from neuro.deployment.generation import generate
    from neuro.exchange.events import events_to_frames
    from neuro.graph import Population, Projection, SpikingGraph, load_graph, save_graph
    from neuro.modules.attention import split_attention
    from neuro.modules.thresholds import EventThreshold
    from neuro.training.insert import insert_thresholds
    from neuro.training.loop import TrainSettings, fine_tune

_HOME = {
    "graph_account": "neuro.accounting.account",
    "GraphAccount": "neuro.accounting.account",
    "analyse": "neuro.analysis.compatibility",
    "CompatibilityReport": "neuro.analysis.compatibility",
    "NothingToMap": "neuro.analysis.compatibility",
    "calibrate": "neuro.conversion.calibration",
    "Calibration": "neuro.conversion.calibration",
    "convert": "neuro.conversion.routes",
    "convert_spiking": "neuro.conversion.spiking.convert",
    "describe": "neuro.conversion.spiking.describing",
    "to_xylo": "neuro.conversion.spiking.xylo.convert",
    "RateConfig": "neuro.conversion.rate",
    "SigmaDeltaConfig": "neuro.conversion.sigma_delta",
    "GradedConfig": "neuro.conversion.graded",
    "split_attention": "neuro.modules.attention",
    "LostLayer": "neuro.conversion.plan",
    "Plan": "neuro.conversion.plan",
    "Segment": "neuro.conversion.plan",
    "save_plan": "neuro.conversion.plan",
    "load_plan": "neuro.conversion.plan",
    "deploy": "neuro.deployment.deployed",
    "save_deployed": "neuro.deployment.deployed",
    "load_deployed": "neuro.deployment.deployed",
    "Deployed": "neuro.deployment.deployed",
    "generate": "neuro.deployment.generation",
    "events_to_frames": "neuro.exchange.events",
    "Population": "neuro.graph",
    "Projection": "neuro.graph",
    "SpikingGraph": "neuro.graph",
    "save_graph": "neuro.graph",
    "load_graph": "neuro.graph",
    "LayerRule": "neuro.analysis.registry",
    "prepare": "neuro.analysis.preparation",
    "register_layer": "neuro.analysis.registry",
    "unregister_layer": "neuro.analysis.registry",
    "rms_norm_graph": "neuro.conversion.norm",
    "EventThreshold": "neuro.modules.thresholds",
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
    "GraphAccount",
    "LayerRule",
    "LostLayer",
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
    "convert_spiking",
    "deploy",
    "describe",
    "events_to_frames",
    "fine_tune",
    "generate",
    "graph_account",
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
    "to_xylo",
    "unregister_layer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'neuro' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
