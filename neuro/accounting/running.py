"""A run of a graph for its account: many samples in parts, so that no more than a part's messages are held at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from neuro.graph.network import SpikingGraph
from neuro.simulators.activity import Activity, PopulationCounts, ProjectionCounts
from neuro.simulators.fixed_point import simulate
from neuro.simulators.inputs import Integers, checked_run

MOST_MESSAGES = 2**26
"""Messages of all neurons, steps and samples that one part may hold: 256 MiB."""
Counted = TypeVar("Counted", PopulationCounts, ProjectionCounts)


@dataclass(frozen=True)
class CountedRun:
    """What a run did.

    Attributes:
        activity: counts over all samples, and the outputs' messages.
        sent: (population, output port) -> messages other than 0 of each neuron, all samples and steps, int64 (size,).
    """

    activity: Activity
    sent: Mapping[tuple[str, str], Tensor]


def counted_run(
    graph: SpikingGraph,
    inputs: Mapping[str, Integers],
    *,
    mode: str = "lava",
    steps: int | None = None,
    device: torch.device | str | None = None,
    most_messages: int = MOST_MESSAGES,
) -> CountedRun:
    """Run every sample from rest on the fixed-point simulator.

    Args:
        graph, inputs, mode, steps, device: as `fixed_point.simulate`.
        most_messages: that one part may hold; a part has at least one sample.

    Raises:
        InputError, GraphError, ValueError: as `fixed_point.simulate`.
    """
    values, batch, length = checked_run(graph, inputs, steps)
    each = length * sum(population.size for population in graph.populations)
    size = max(1, most_messages // each)
    second = any(p.source_port != "s_out" for p in graph.projections)
    record = ("spikes", "spikes2") if second else ("spikes",)
    parts: list[Activity] = []
    sent: dict[tuple[str, str], Tensor] = {}
    for first in range(0, batch, size):
        part = {name: value[first : first + size] for name, value in values.items()}
        found = simulate(graph, part, mode=mode, record=record, steps=steps, device=device)
        messages = {(name, "s_out"): spikes for name, spikes in found.spikes.items()}
        messages |= {(name, "s2_out"): states["spikes2"] for name, states in found.states.items() if "spikes2" in states}
        for key, messages_BTN in messages.items():
            each_N = (messages_BTN != 0).sum(dim=(0, 1)).cpu()
            sent[key] = sent[key] + each_N if key in sent else each_N
        outputs = {name: found.spikes[name] for name in graph.outputs}
        parts.append(Activity(outputs, {}, found.batch, length, **_rest(found)))
    return CountedRun(parts[0] if len(parts) == 1 else _joined(parts), sent)


def _rest(found: Activity) -> dict[str, Any]:
    names = ("ran_on", "projections", "populations", "models", "notes", "mode")
    return {name: getattr(found, name) for name in names}


def _joined(parts: list[Activity]) -> Activity:
    first = parts[0]
    rest = _rest(first) | {
        "projections": {name: _summed([p.projections[name] for p in parts]) for name in first.projections},
        "populations": {name: _summed([p.populations[name] for p in parts]) for name in first.populations},
        "notes": tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    }
    spikes = {name: torch.cat([part.spikes[name] for part in parts]) for name in first.spikes}
    return Activity(spikes, {}, sum(part.batch for part in parts), first.steps, **rest)


def _summed(counts: Iterable[Counted]) -> Counted:
    """Counts of several parts: sums, and of the largest magnitudes the largest."""
    items = list(counts)
    values = {
        field.name: (max if field.name.startswith("max_") else sum)(getattr(item, field.name) for item in items)
        for field in fields(items[0])
    }
    return type(items[0])(**values)
