"""What a graph of Xylo takes of its chip's pools, as `hardware.placement.pooled` holds it against the limits."""

from __future__ import annotations

import numpy as np

from hardware.placement.pooled import PooledDemand
from hardware.text import quoted
from neuro.graph.network import SpikingGraph
from neuro.graph.xylo import XyloNetwork, xylo_network


def pooled_demand(graph: SpikingGraph, name: str = "the network") -> PooledDemand:
    """Channels, neurons, synapses and fan-outs of a graph.

    Raises:
        GraphError: a graph that is no network of Xylo, as `xylo_network`.
    """
    network = xylo_network(graph)
    recurrent = np.unique(network.synapses["rec"][:, :2], axis=0)  # one entry holds the weights of both synapses
    fanout = np.bincount(recurrent[:, 0], minlength=max(1, network.sizes["hidden"]))
    second = any((rows[:, 2] == 1).any() for rows in network.synapses.values())
    used = {
        "inputs": network.sizes["input"],
        "hidden": network.sizes["hidden"],
        "readouts": network.sizes["readout"],
        "synapses_per_neuron": 1 + int(second),
        "fanout": int(fanout.max()),
        "recurrent_entries": len(recurrent),
        "input_reach": len(np.unique(network.synapses["in"][:, 1])),
        "output_reach": len(np.unique(network.synapses["out"][:, 0])),
    }
    at = {"fanout": _named(network, int(fanout.argmax()))} if len(recurrent) else {}
    return PooledDemand(name, used, at)


def _named(network: XyloNetwork, number: int) -> str:
    population, first = next((p, first) for p, first in reversed(network.hidden) if first <= number)
    return f"neuron {number - first} of population {quoted(population.name)}"
