"""The matrix products of the simulator alone, with nothing around them: what its speed is a share of."""

from __future__ import annotations

from collections.abc import Callable

import torch

from neuro.graph import SpikingGraph
from neuro.simulators.activity import Activity
from neuro.simulators.exact import Matrix


def products(graph: SpikingGraph, activity: Activity, rows: int) -> tuple[Callable[[], None], int, str]:
    """One call does the products of all dense projections, once each, on messages that the network really sent.

    Args:
        activity: of a run that recorded spikes.
        rows: steps and samples in one product, at most.

    Returns:
        (the call, how many rows it multiplies, the arithmetic that the simulator takes for them: "int8", which is
        `torch._int_mm` with int32 sums, or a floating-point type).
    """
    calls, how = [], ""
    for projection in graph.projections:
        matrix = Matrix(projection.weight, torch.device("cpu"))
        x = activity.spikes[projection.source].reshape(-1, projection.weight.shape[1])[:rows].to(torch.int8).contiguous()
        how = matrix.arithmetic(len(x), 1)
        x = x if how == "int8" else x.to(getattr(torch, how))
        out = torch.empty(len(x), projection.weight.shape[0], dtype=torch.int32 if how == "int8" else x.dtype)
        weight = matrix._weight(x.dtype)
        multiply = torch._int_mm if how == "int8" else torch.mm
        calls.append((multiply, x, weight, out))

    def all_of_them() -> None:
        for multiply, x, weight, out in calls:
            multiply(x, weight, out=out)

    return all_of_them, len(calls[0][1]), how
