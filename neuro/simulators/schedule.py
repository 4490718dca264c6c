"""In which order a graph is evaluated: what lies on a loop, what comes first, how many steps a signal takes."""

from __future__ import annotations

from hardware.text import listed, quoted
from neuro.graph import GraphError, SpikingGraph


class PipelineError(GraphError):
    """A graph that cannot take one token per step: it has a loop, or paths of unequal length meet in it."""


def components(graph: SpikingGraph) -> list[tuple[tuple[str, ...], bool]]:
    """Strongly connected components, sources first (Tarjan 1972, without recursion).

    Returns:
        (names of the populations, whether they form a loop) for each component; a population with a projection to
        itself is a loop of one.
    """
    successors: dict[str, list[str]] = {p.name: [] for p in graph.populations}
    for projection in graph.projections:
        successors[projection.source].append(projection.target)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[tuple[tuple[str, ...], bool]] = []
    for root in successors:
        if root in index:
            continue
        work = [(root, iter(successors[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        while work:
            node, rest = work[-1]
            child = next((c for c in rest if c not in index or c in stack), None)
            if child is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    names = tuple(reversed(stack[stack.index(node) :]))
                    del stack[stack.index(node) :]
                    found.append((names, len(names) > 1 or node in successors[node]))
            elif child in index:
                low[node] = min(low[node], index[child])
            else:
                index[child] = low[child] = len(index)
                stack.append(child)
                work.append((child, iter(successors[child])))
    return found[::-1]


def depths(graph: SpikingGraph) -> dict[str, int]:
    """Steps from the inputs to each population of a feed-forward graph: the number of projections on the way.

    Raises:
        PipelineError: a loop, a population no input reaches, or paths of unequal length to one population.
    """
    depth: dict[str, int] = {}
    for names, loop in components(graph):
        if loop:
            raise PipelineError(f"populations {listed(names)} form a loop; no fixed latency exists")
        name = names[0]
        if graph.population(name).kind == "input":
            depth[name] = 0
            continue
        arrivals = {}
        for p in graph.incoming(name):
            if p.delays is not None and len(set(p.delays[p.weight != 0].tolist())) > 1:
                raise PipelineError(f"projection {quoted(p.name)} has several delays; a token would meet others on the way")
            arrivals[depth[p.source] + 1 + p.max_delay] = p
        if not arrivals:
            raise PipelineError(f"population {quoted(name)} is reached by no input; it has no latency")
        if len(arrivals) > 1:
            ways = listed(f"{steps} by {quoted(p.name)}" for steps, p in sorted(arrivals.items()))
            raise PipelineError(
                f"population {quoted(name)} is reached by paths of unequal length (steps: {ways}); a token would meet"
                " another one. Lengthen the short path with an identity projection and a graded population"
            )
        depth[name] = next(iter(arrivals))
    return depth


def latency(graph: SpikingGraph, population: str) -> int:
    """Steps until what enters at step t leaves `population`: a message sent in at t is answered at t + latency.

    Raises:
        PipelineError: as `depths`.
        GraphError: no such population.
    """
    graph.population(population)
    return depths(graph)[population]
