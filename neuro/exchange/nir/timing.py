"""Steps of the chip against steps of a NIR graph.

On the chip every projection takes 1 + delay steps; an edge of a NIR graph takes none. A population whose shortest way
from an input takes d steps does at chip step t + d what its NIR node does at step t, both from rest: it is d steps ahead
there. A projection then needs a Delay node only for what is left of its own steps, none where it lies on a shortest way.
A loop of one step on itself has none either: readers give a neuron its own spikes of the step before.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hardware.text import quoted
from neuro.exchange.nir.library import NotInNir
from neuro.graph import Population, Projection, SpikingGraph


def delays_used(projection: Projection) -> tuple[int, ...]:
    """Delays beyond one step, ascending, of the synapses whose weight is not 0; (0,) where there is none."""
    if projection.delays is None:
        return (0,)
    return tuple(int(d) for d in np.unique(projection.delays[projection.weight != 0])) or (0,)


def shifts(graph: SpikingGraph) -> dict[str, int]:
    """Steps that each population's NIR node is ahead of the chip: those of the shortest way from an input."""
    ways = [(p.source, p.target, 1 + delays_used(p)[0]) for p in graph.projections if p.source != p.target]
    fed = {target for _, target, _ in ways}
    found = {p.name: 0 for p in graph.populations if p.name not in fed}
    fixed = set(found)
    while True:
        changed = False
        for source, target, steps in ways:
            if source in found and target not in fixed and found[source] + steps < found.get(target, 2**62):
                found[target] = found[source] + steps
                changed = True
        missing = [p.name for p in graph.populations if p.name not in found]
        if not changed and not missing:
            return found
        if not changed:  # a loop that no input reaches
            found[missing[0]] = 0
            fixed.add(missing[0])


def node_delay(projection: Projection, delay: int, ahead: Mapping[str, int], literal: bool = False) -> int:
    """Steps that a Delay node takes for the synapses of that delay, 0: none. `literal`: also for a loop of one step."""
    steps = 1 + delay - (ahead[projection.target] - ahead[projection.source])
    return 0 if steps == 1 and projection.source == projection.target and not literal else steps


def bias_units(population: Population) -> np.ndarray:
    """What is added to v at each step, in units of v: int64 (size,); zeros for kinds without a bias of that form."""
    mantissa = np.asarray(population.params.get("bias_mant", 0), dtype=np.int64)
    exponent = np.asarray(population.params.get("bias_exp", 0), dtype=np.int64)
    return np.broadcast_to(mantissa << exponent, (population.size,))


def run_length(graph: SpikingGraph, ahead: Mapping[str, int]) -> int | None:
    """Steps from rest for which the NIR graph stands; None: any number.

    A `lif_reset` population starts again at its interval, which NIR cannot say: the graph stands for one interval. Where a
    bias acts while the pipeline fills, only such a restart at the right step makes chip and NIR the same.

    Raises:
        NotInNir: a restart at another step than the first, a bias that acts early with nothing to undo it.
    """
    lengths = []
    for population in graph.populations:
        if population.kind != "lif_reset":
            continue
        interval, first = int(population.params["reset_interval"]), ahead[population.name] + 1
        if (int(population.params["reset_offset"]) - first) % interval:
            raise NotInNir(
                f"population {quoted(population.name)} (lif_reset) restarts at steps "
                f"{population.params['reset_offset']} mod"
                f" {interval}, a sample's first step reaches it at step {first}; NIR has no restart within a sample."
                f" Make reset_offset {first % interval}, or the kind lif"
            )
        lengths.append(interval)
    _check_early(graph, ahead)
    return min(lengths, default=None)


def _check_early(graph: SpikingGraph, ahead: Mapping[str, int]) -> None:
    """NotInNir where something happens on the chip before a sample's first step that NIR's rest does not have."""
    kinds = {p.name: p.kind for p in graph.populations}
    biased = {p.name for p in graph.populations if ahead[p.name] > 0 and np.any(bias_units(p))}
    early = set(biased)
    while more := {p.target for p in graph.projections if p.source in early and kinds[p.target] == "graded"} - early:
        early |= more
    for population in graph.populations:
        if population.name in biased and population.kind != "lif_reset":
            raise _early(population, "its bias acts")
        for projection in graph.incoming(population.name):
            undone = population.kind in ("lif_reset", "graded") and projection.source != population.name
            if projection.source in early and not (
                undone and node_delay(projection, delays_used(projection)[-1], ahead) == 0
            ):
                raise _early(population, f"messages of {quoted(projection.source)}, which has a bias, reach it")


def _early(population: Population, what: str) -> NotInNir:
    return NotInNir(
        f"population {quoted(population.name)} ({population.kind}): {what} while the pipeline fills, "
        f"{quoted(population.name)} being"
        " steps behind its input on the chip and none in NIR. Convert with steps=T (kind lif_reset), or write with"
        " timing='literal', which spells each step out as a Delay node"
    )
