"""Which process computes which populations of a graph, and how many steps it may go on without news of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from hardware.text import listed, quoted
from neuro.graph import GraphError, Population, SpikingGraph
from neuro.graph.kinds import LIF_KINDS
from neuro.simulators.schedule import components

Port = tuple[str, str]
"""A population and one of its output ports."""


class SplitError(GraphError):
    """A graph that cannot be split as asked: too few populations, a name that is missing or unknown, no such process."""


def work_of(graph: SpikingGraph, population: Population) -> int:
    """Roughly what a step of a population costs: its neurons, and the synapses that end at them."""
    return population.size + sum(_synapses(graph, projection.name) for projection in graph.incoming(population.name))


def _synapses(graph: SpikingGraph, name: str) -> int:
    projection = next(p for p in graph.projections if p.name == name)
    if projection.conv is None:
        return int(projection.weight.size)
    return graph.population(projection.target).size * int(projection.weight[0].size)


def partition(graph: SpikingGraph, parts: int) -> dict[str, int]:
    """Population -> process, 0 to `parts` - 1: populations in the order in which signals reach them, cut where each part
    has about the same work. Inputs are computed wherever they are needed and count for the process of their first target.

    Raises:
        SplitError: fewer populations that compute than parts.
    """
    order = [graph.population(name) for names, _ in components(graph) for name in names]
    computing = [population for population in order if population.kind != "input"]
    if not 1 <= parts <= len(computing):
        raise SplitError(
            f"{parts} parts of a graph of {len(computing)} populations that compute; 1 to {len(computing)} are possible"
        )
    total, found, done, part = sum(work_of(graph, each) for each in computing), {}, 0, 0
    for number, population in enumerate(computing):
        left = len(computing) - number
        # the next part begins where this one has its share, or where there are only as many populations left as parts
        if number and part < parts - 1 and (done >= total * (part + 1) / parts or left == parts - 1 - part):
            part += 1
        found[population.name] = part
        done += work_of(graph, population)
    for population in order:
        if population.kind == "input":
            targets = [found[p.target] for p in graph.outgoing(population.name) if p.target in found]
            found[population.name] = min(targets, default=0)
    return {population.name: found[population.name] for population in graph.populations}


def checked(graph: SpikingGraph, assignment: Mapping[str, int], parts: int) -> dict[str, int]:
    """An assignment of one's own, in the graph's order.

    Raises:
        SplitError: a population without a process, an unknown one, or a process that there is not.
    """
    names = [population.name for population in graph.populations]
    for name in assignment:
        if name not in names:
            raise SplitError(f"the split names {quoted(name)}, which is no population; there are: {listed(names)}")
    for name in names:
        if name not in assignment:
            raise SplitError(f"the split says nothing of population {quoted(name)}")
        part = assignment[name]
        if isinstance(part, bool) or not isinstance(part, int) or not 0 <= part < parts:
            raise SplitError(f"population {quoted(name)} is given to process {quoted(part)}; there are 0 to {parts - 1}")
    return {name: assignment[name] for name in names}


def crossing(graph: SpikingGraph, assignment: Mapping[str, int]) -> list[Port]:
    """Output ports whose messages another process needs, in the graph's order; those of inputs are known everywhere."""
    needed = {
        (p.source, p.source_port)
        for p in graph.projections
        if assignment[p.source] != assignment[p.target] and graph.population(p.source).kind != "input"
    }
    ports = dict.fromkeys((p.source, p.source_port) for p in graph.projections)
    return [port for port in ports if port in needed]


def lookahead(graph: SpikingGraph, assignment: Mapping[str, int]) -> int | None:
    """Steps that every process may go on without news of the others: one, and the shortest delay that leads from one to
    another (the "minimum delay" of distributed simulators). None where nothing crosses."""
    ports = set(crossing(graph, assignment))
    delays = [
        0 if p.delays is None else int(p.delays.min())
        for p in graph.projections
        if (p.source, p.source_port) in ports and assignment[p.source] != assignment[p.target]
    ]
    return 1 + min(delays) if delays else None


def narrow_port(graph: SpikingGraph, port: Port) -> bool:
    """Whether messages of a port always fit a byte."""
    return graph.population(port[0]).kind in LIF_KINDS


def shares(batch: int, parts: int) -> Sequence[slice]:
    """Samples of each process, the first ones one more where they do not divide; no more processes than samples."""
    parts = min(parts, batch)
    each, more = divmod(batch, parts)
    edges = [part * each + min(part, more) for part in range(parts + 1)]
    return [slice(low, high) for low, high in pairwise(edges)]
