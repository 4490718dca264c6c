"""The runner of each route, chosen by a segment's code."""

from __future__ import annotations

from torch import Tensor

from hardware.text import quoted
from neuro.conversion.plan import Segment
from neuro.deployment.networks import NetworkRunner
from neuro.deployment.networks_over_time import DeltaNetworkRunner, RateNetworkRunner
from neuro.deployment.runner import SegmentRunner
from neuro.deployment.segments import GradedRunner
from neuro.deployment.spike_counts import RateRunner
from neuro.deployment.streams import DeltaRunner

NETWORKS = {"graded": NetworkRunner, "delta": DeltaNetworkRunner, "rate": RateNetworkRunner}


def runner_for(segment: Segment, backend: str, biases: list[Tensor | None], mode: str = "lava") -> SegmentRunner:
    """The runner of a segment's code: "graded", "delta" or "rate".

    Args:
        segment: of a plan.
        backend: of `neuro.deployment.runner.BACKENDS`.
        biases: of its linear layers in float, for the graded route's twin; the other routes' twins use the graph's.
        mode: of the simulator.

    Raises:
        ValueError: a code that no runner knows.
    """
    if segment.stages and segment.code in NETWORKS:
        return NETWORKS[segment.code](segment, backend, mode)
    if segment.code == "graded":
        return GradedRunner(segment, backend, biases, mode)
    if segment.code == "delta":
        return DeltaRunner(segment, backend, mode)
    if segment.code == "rate":
        return RateRunner(segment, backend, mode)
    raise ValueError(f"segment {quoted(segment.name)} has code {quoted(segment.code)}; known: graded, delta, rate")
