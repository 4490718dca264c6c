"""Right shifts of sums moved from the synapses' exponents into product neurons, where mode "chip" computes them as well.

Lava shifts the sum of a projection; published emulators of the chip shift every weight, which then loses its low bits. What
both agree on is an exponent that only takes back the weights' spacing (-1 for 8-bit weights, which are even) and a product
neuron's own shift. So

    source -> Dense (weight_exp -9) -> target

becomes

    source -> Dense (weight_exp -1) -> ProdNeuron (x 1, >> 8) -> target
                              "ones" --^

with the same integers, one step later; shorter ways to the same target wait in relays. The sum stands unshifted in the
product neuron, so it must fit its 24 bits: `GradedConfig(narrow="neuron")` chooses the widths for that.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hardware.text import quoted
from neuro.conversion.mapped import one_to_one
from neuro.graph import Population, Projection, SpikingGraph
from neuro.graph.synapses import weight_step
from neuro.simulators.schedule import depths

ONES = "ones"  # input population of one neuron that sends 1 at every step
PREFIX = "narrow."  # of the product population behind a projection
WORD_BITS = 24


def spacing_bits(projection: Projection) -> int:
    """log2 of the spacing of a projection's weights: how far its sum can be shifted without loss."""
    return weight_step(projection.sign_mode, projection.num_weight_bits).bit_length() - 1


def shifts_weights(projection: Projection) -> bool:
    """Whether its exponent, acting on each synapse, would take bits from the weights."""
    return -projection.weight_exp > spacing_bits(projection)


def total_shift(graph: SpikingGraph, projection: Projection) -> int:
    """By how much a projection's sum is shifted right in all, in its exponent and in a product neuron behind it."""
    behind = graph.population(projection.target).params["exp"] if projection.target.startswith(PREFIX) else 0
    assert isinstance(behind, int)
    return behind - projection.weight_exp


def narrow_in_neurons(graph: SpikingGraph) -> SpikingGraph:
    """The same graph with no exponent below its weights' spacing; an input population "ones" is new, if anything is.

    Raises:
        ValueError: a projection to be moved that is neither dense nor sparse.
        neuro.simulators.schedule.PipelineError: a loop, or ways of unequal length to one population.
    """
    depth = depths(graph)
    if not any(shifts_weights(p) for p in graph.projections):
        return graph
    populations = [Population(ONES, "input", 1)]
    projections: list[Projection] = []
    at: dict[str, int] = {}
    known = {ONES}

    def later(source: str, steps: int) -> str:
        """The population that sends what `source` sends, so many steps later."""
        for step in range(1, steps + 1):
            name, before = f"late{step}.{source}", source if step == 1 else f"late{step - 1}.{source}"
            if name not in known:
                known.add(name)
                size = 1 if source == ONES else graph.population(source).size
                populations.append(Population(name, "graded", size, {"vth": 0}))
                projections.append(one_to_one(f"delay{step}.{source}", before, name, size, 0, WORD_BITS))
        return f"late{steps}.{source}" if steps else source

    for population in sorted(graph.populations, key=lambda found: depth[found.name]):
        incoming = graph.incoming(population.name)
        arrival = max((at[p.source] + 1 + shifts_weights(p) for p in incoming), default=0)
        at[population.name] = arrival
        for p in incoming:
            moved = shifts_weights(p)
            source = later(p.source, arrival - 1 - moved - at[p.source])
            if not moved:
                projections.append(replace(p, source=source))
                continue
            if p.kind not in ("dense", "sparse"):
                raise ValueError(
                    f"projection {quoted(p.name)} is {p.kind}; only dense and sparse ones can be shifted in neurons"
                )
            name, size, exact = f"{PREFIX}{p.name}", p.ends[0], spacing_bits(p)
            one = np.full((size, 1), 2, dtype=np.int32)
            populations.append(Population(name, "product", size, {"vth": 0, "exp": -p.weight_exp - exact}))
            projections += [
                replace(p, source=source, target=name, port="a_in1", weight_exp=-exact),
                Projection(f"one.{p.name}", later(ONES, arrival - 2), name, "a_in2", one, -1, num_message_bits=8),
                one_to_one(f"pass.{p.name}", name, population.name, size, 0, WORD_BITS, p.port),
            ]
        populations.append(population)
    return SpikingGraph(tuple(populations), tuple(projections), graph.outputs, {**graph.meta, "narrow": "neuron"})
