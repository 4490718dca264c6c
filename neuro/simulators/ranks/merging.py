"""Results of several processes as the one result that a single process would have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from neuro.graph import SpikingGraph
from neuro.simulators.activity import Activity, CoreCounts, Messages, PopulationCounts, ProjectionCounts

LARGEST = ("max_abs_payload", "max_abs_u", "max_abs_v")
"""Counts of which the largest is kept; all others add up."""


def merged(parts: Sequence[Activity], graph: SpikingGraph, by_samples: bool) -> Activity:
    """One result out of those of all processes: samples one behind the other, or populations side by side.

    Args:
        parts: in the order of the processes; of the same run.
        by_samples: whether the processes had samples of their own; else they had populations.
    """
    first = parts[0]
    join: Callable[[list[Tensor]], Tensor] = (lambda found: torch.cat(found)) if by_samples else (lambda found: found[0])
    spikes: dict[str, Tensor] = {}
    states: dict[str, dict[str, Tensor]] = {}
    for population in graph.populations:
        name = population.name
        sent = [part.spikes[name] for part in parts if name in part.spikes]
        if sent:
            spikes[name] = join(sent)
        kept = [part.states[name] for part in parts if name in part.states]
        if kept:
            states[name] = {variable: join([each[variable] for each in kept]) for variable in kept[0]}
    cores = sorted({core for part in parts for core in part.cores})
    return replace(
        first,
        spikes=Messages(spikes),
        states=states,
        batch=sum(part.batch for part in parts) if by_samples else first.batch,
        projections=_counts([part.projections for part in parts], ProjectionCounts),
        populations=_counts([part.populations for part in parts], PopulationCounts),
        cores={core: _added([part.cores[core] for part in parts if core in part.cores], CoreCounts) for core in cores},
    )


def _counts(found: Sequence[Mapping[str, Any]], kind: type[Any]) -> dict[str, Any]:
    return {name: _added([each[name] for each in found], kind) for name in found[0]}


def _added(found: Sequence[Any], kind: type[Any]) -> Any:
    values = [asdict(each) for each in found]
    return kind(**{key: (max if key in LARGEST else sum)(value[key] for value in values) for key in values[0]})


def refusable(activity: Activity) -> bool:
    """Whether a strict run may refuse: something left its register, or a message its width."""
    keys = ("saturations_v", "wraps_u", "wraps_sum", "wide_a", "wide_v")
    return any(getattr(counts, key) for counts in activity.populations.values() for key in keys) or any(
        counts.payload_overflows for counts in activity.projections.values()
    )
