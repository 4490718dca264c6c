"""What a deployment of any module found, whatever the route, and the part of its record that all routes share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from experiments.runs.samples.judging import Judged, confusion
from experiments.samples.records import CLASSES, Samples
from hardware.energy.account import Counts
from hardware.placement import Placement
from neuro.conversion.plan import Plan, save_plan
from neuro.graph import FILE_SUFFIX, SpikingGraph, save_graph

MODELS = ("float", "quantised", "simulated")


@dataclass(frozen=True)
class Outcome:
    """A deployment before it is written down.

    Attributes:
        judged: float, quantised, simulated.
        counts: per layer, a token being a sample.
        placement: on cores; None where it does not fit.
        messages: population -> messages (batch, steps, neurons) of some held-out samples.
        plan: of the routes that take layers one by one. graph: of the lif route, which has one.
        document: content of `deploy.json`.
    """

    judged: dict[str, Judged]
    counts: list[Counts]
    placement: Placement | None
    messages: Mapping[str, Tensor]
    plan: Plan | None
    graph: SpikingGraph | None = None
    document: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the integer graphs into a folder that is not there yet."""
        if self.plan is not None:
            save_plan(self.plan, folder)
        if self.graph is not None:
            folder.mkdir(parents=True)
            save_graph(self.graph, folder / f"network{FILE_SUFFIX}")


def answered(
    model: nn.Module, samples: Samples, judged: Mapping[str, Judged], name: str, chip: str, route: str
) -> dict[str, Any]:
    """What was deployed on what, and how it was answered."""
    metric = "accuracy" if samples.task == CLASSES else "nrmse"
    plain = judged["float"]
    return {
        "module": name,
        "model": type(model).__name__,
        "data": samples.name,
        "source": samples.source,
        "task": samples.task,
        "metric": metric,
        "chip": chip,
        "route": route,
        "ran_on": "simulated (ours, lava)",
        "samples": len(samples.x),
        "sample_shape": list(samples.x.shape[1:]),
        metric: {which: asdict(judged[which].result) for which in MODELS},
        "less_float": {which: asdict(judged[which].less(plain)) for which in MODELS[1:]},
        "agreement": {which: judged[which].agreement(plain) for which in MODELS[1:]},
        "confusion": {which: confusion(samples, judged[which]) for which in ("float", "simulated")},
        "seconds": {which: judged[which].seconds for which in MODELS},
    }
