"""Counts of one run: traffic of projections, work and range of populations, and, given a placement, work of cores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from hardware.text import quoted
from neuro.graph import GraphError, SpikingGraph
from neuro.graph.kinds import KINDS
from neuro.graph.values import integer, integer_array, is_array
from neuro.simulators.activity import CoreCounts, PopulationCounts, ProjectionCounts

MOST_CORES = 2**31 - 1
Placement = Mapping[str, "np.ndarray | Sequence[int] | int"]


def checked_placement(graph: SpikingGraph, placement: Placement | None) -> dict[str, np.ndarray] | None:
    """A placement as int64 (size,) per population.

    Args:
        placement: population -> core number of each neuron, or one number for all; populations left out (inputs, say)
            are on no core.

    Raises:
        GraphError: a population that is not in the graph, another number of neurons, numbers that are no integers >= 0.
    """
    if placement is None:
        return None
    found = {}
    for name, given in placement.items():
        size = graph.population(name).size
        where = f"placement of {quoted(name)}"
        cores = integer_array(given if is_array(given) else [integer(given, where)] * size, where)
        bad = np.flatnonzero((cores < 0) | (cores > MOST_CORES))
        if bad.size:
            raise GraphError(f"{where} is {int(cores.flat[bad[0]])}; core numbers are integers in 0..{MOST_CORES}")
        if cores.shape != (size,):
            raise GraphError(f"{where} has shape {cores.shape}; the population has {size} neurons")
        found[name] = cores.astype(np.int64)
    return found


class Tally:
    """Sums over the steps counted so far."""

    def __init__(self, graph: SpikingGraph, placement: dict[str, np.ndarray] | None) -> None:
        self._graph, self._placement = graph, placement
        self.populations = {p.name: {f.name: 0 for f in fields(PopulationCounts)} for p in graph.populations}
        self.projections = {p.name: {f.name: 0 for f in fields(ProjectionCounts)} for p in graph.projections}
        self._sent: dict[tuple[str, str], Tensor] = {}
        self._total: dict[tuple[str, str], int] = {}
        self._updates = dict.fromkeys(self.populations, 0)  # of each neuron
        # Sources whose messages do not all meet the same number of synapses are counted neuron by neuron.
        self._each = {
            (p.source, p.source_port) for p in graph.projections if placement is not None or p.kind in ("sparse", "conv")
        }
        if placement is not None:
            self._each |= {(p.name, "s_out") for p in graph.populations}

    def wants_each(self, name: str, port: str = "s_out") -> bool:
        """Whether the messages of an output port must be counted neuron by neuron."""
        return (name, port) in self._each

    def sent(self, name: str, port: str, events: int, each_N: Tensor | None) -> None:
        """Note messages of one output port that are not 0: how many, and of each neuron where that is wanted."""
        key = (name, port)
        if each_N is not None:
            self._sent[key] = self._sent[key] + each_N if key in self._sent else each_N.to(torch.int64)
        self._total[key] = self._total.get(key, 0) + events

    def updated(self, name: str, times: int, events: int) -> None:
        """Note that each neuron of a population was updated `times` times, and that `events` messages came of it."""
        counts = self.populations[name]
        counts["updates_active"] += events
        counts["updates_inactive"] += times * self._graph.population(name).size - events
        self._updates[name] += times

    def raise_to(self, name: str, key: str, value: int) -> None:
        """Keep the largest value seen."""
        self.populations[name][key] = max(self.populations[name][key], value)

    def finish(self) -> dict[int, CoreCounts]:
        """Fill in what follows from the messages of each source; returns the counts of each core."""
        cores: dict[int, dict[str, int]] = {}
        for projection in self._graph.projections:
            key = (projection.source, projection.source_port)
            counts = self.projections[projection.name]
            counts["events"] = self._total.get(key, 0)
            if key not in self._each:
                counts["synops"] = counts["weight_reads"] = counts["events"] * projection.ends[0]
                continue
            sent = self._sent[key].cpu().numpy() if key in self._sent else np.zeros(projection.ends[1], dtype=np.int64)
            counts["synops"] = int(sent @ projection.fan_out())
            counts["weight_reads"] = int(sent @ projection.reads())
            self._place_synops(cores, projection.name, sent)
        for name, where in (self._placement or {}).items():
            computes = self._graph.population(name).kind != "input"
            updates = np.bincount(where) * (self._updates[name] if computes else 0)
            _add(cores, "neuron_updates", updates)
            for port in KINDS[self._graph.population(name).kind].outs:
                if (name, port) in self._sent:
                    _add(cores, "spikes", np.bincount(where, weights=self._sent[name, port].cpu().numpy()))
        return {core: CoreCounts(**counts) for core, counts in sorted(cores.items())}

    def _place_synops(self, cores: dict[int, dict[str, int]], name: str, sent: np.ndarray) -> None:
        projection = next(p for p in self._graph.projections if p.name == name)
        where = None if self._placement is None else self._placement.get(projection.target)
        if where is None:
            return
        if projection.kind in ("dense", "delay_dense"):
            done = np.bincount(where) * int(sent.sum())
        else:
            targets, sources = projection.synapse_ends()
            done = np.bincount(where[targets], weights=sent[sources])
        _add(cores, "synops", done)
        _add(cores, "weight_reads", done)


def _add(cores: dict[int, dict[str, int]], key: str, values: np.ndarray) -> None:
    for core in np.flatnonzero(values):
        found = cores.setdefault(int(core), {f.name: 0 for f in fields(CoreCounts)})
        found[key] += int(values[core])
