"""A spiking graph's demands on a chip, as `hardware.placement` takes them, and the way back: neuron -> core."""

from __future__ import annotations

import numpy as np

from hardware.placement import Connection, Convolution, LayerDemand, Placement
from hardware.placement.pooled import PooledDemand
from hardware.text import quoted
from neuro.graph.kinds import LIF_KINDS, XYLO_KINDS
from neuro.graph.network import SpikingGraph
from neuro.graph.synapses import Projection
from neuro.graph.xylo import XyloNetwork, xylo_network
from neuro.simulators.activity import Activity


def stored_bits(weight: np.ndarray, sign_mode: str) -> int:
    """Bits that one weight takes in synaptic memory, common zero bits at the low end dropped.

    Args:
        weight: integers of any shape.
        sign_mode: "mixed" (a sign bit per weight), "excitatory" or "inhibitory" (one sign for all: magnitudes).

    Returns:
        At least 1. [-2, 0, 2] mixed is [-1, 0, 1]: 2 bits; mixed 8-bit weights (even, -256..254): 8 bits.
    """
    values = np.unique(np.asarray(weight).astype(np.int64))
    values = values[values != 0]
    if not values.size:
        return 1
    low_zeros = min((int(v) & -int(v)).bit_length() - 1 for v in values)
    low, high = int(values.min()) >> low_zeros, int(values.max()) >> low_zeros
    if sign_mode == "mixed":
        return 1 + max((max(high, 0)).bit_length(), (-min(low, 0) - 1).bit_length() if low < 0 else 0)
    return max(abs(low), abs(high)).bit_length()


def layer_demands(graph: SpikingGraph, activity: Activity | None = None, prefix: str = "") -> tuple[LayerDemand, ...]:
    """One demand per population; input populations stay on the host and only name sources.

    Args:
        graph: the network.
        activity: a run of the same graph: gives each population's messages per neuron and step, by neuron where its
            spikes were recorded, else the mean from its projections' counts. A population with neither counts as not
            measured, at one message per neuron and step.
        prefix: put before every name, for placing several graphs together.

    Returns:
        In the graph's order. Zeros of a dense projection are stored; those of a sparse one are not.

    Raises:
        ValueError: the activity belongs to another graph, or the graph is one of Xylo, which has no cores.
    """
    if activity is not None:
        _check(graph, activity)
    if foreign := next((p for p in graph.populations if p.kind in XYLO_KINDS), None):
        raise ValueError(
            f"population {quoted(foreign.name)} ({foreign.kind}) is of Xylo, whose neurons lie in fixed"
            " pools and on no cores; place it with chip xylo_audio2, xylo_audio3 or xylo_imu"
        )
    found = []
    for population in graph.populations:
        rate, measured = _rate(graph, population.name, population.size, activity)
        outgoing = graph.outgoing(population.name)
        connections = tuple(_connection(projection, prefix) for projection in graph.incoming(population.name))
        found.append(
            LayerDemand(
                name=prefix + population.name,
                neurons=population.size,
                connections=connections,
                on_chip=population.kind != "input",
                payload_bits=max((max(1, p.num_message_bits) for p in outgoing), default=1),
                programmable=population.kind == "lif_general" or population.kind not in ("input", *LIF_KINDS),
                rate=rate,
                measured=measured,
            )
        )
    return tuple(found)


def core_map(graph: SpikingGraph, placement: Placement, prefix: str = "") -> dict[str, np.ndarray]:
    """Core number of every neuron: population -> int32 (size,); -1 for inputs, which are on the host.

    Raises:
        ValueError: the placement holds another network.
    """
    found: dict[str, np.ndarray] = {}
    for population in graph.populations:
        if population.kind == "input":
            found[population.name] = np.full(population.size, -1, dtype=np.int32)
            continue
        try:
            cores = placement.core_of(prefix + population.name)
        except KeyError:
            raise ValueError(
                f"population {quoted(population.name)} is not in the placement; place this graph first"
            ) from None
        if len(cores) != population.size:
            raise ValueError(
                f"population {quoted(population.name)} has {population.size} neurons, the placement {len(cores)};"
                " place this graph"
            )
        found[population.name] = np.asarray(cores, dtype=np.int32)
    return found


def _connection(projection: Projection, prefix: str) -> Connection | Convolution:
    bits = stored_bits(projection.weight, projection.sign_mode)
    source = prefix + projection.source
    if projection.conv is not None:
        geometry = projection.conv
        return Convolution(
            source,
            geometry.input_shape,
            channels=projection.weight.shape[0],
            kernel=(projection.weight.shape[1], projection.weight.shape[2]),
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            groups=geometry.groups,
            weight_bits=bits,
            max_delay=projection.max_delay,
        )
    mask = projection.weight != 0 if projection.kind == "sparse" else None
    return Connection(source, projection.weight.shape[1], bits, max_delay=projection.max_delay, mask=mask)


def _check(graph: SpikingGraph, activity: Activity) -> None:
    sizes = {population.name: population.size for population in graph.populations}
    for name, spikes in activity.spikes.items():
        if sizes.get(name) != spikes.shape[-1]:
            raise ValueError(
                f"activity of {quoted(name)} has {spikes.shape[-1]} neurons, the graph "
                f"{sizes.get(name, 'no such population')};"
                " run this graph"
            )
    names = {projection.name for projection in graph.projections}
    unknown = sorted(set(activity.projections) - names)
    if unknown:
        raise ValueError(f"activity counts projection {quoted(unknown[0])}, which the graph does not have; run this graph")


def _rate(graph: SpikingGraph, name: str, size: int, activity: Activity | None) -> tuple[float | tuple[float, ...], bool]:
    if activity is None:
        return 1.0, False
    outgoing = graph.outgoing(name)
    if name in activity.spikes and all(p.source_port == "s_out" for p in outgoing):
        sent = (activity.spikes[name] != 0).double().mean(dim=(0, 1))
        return tuple(float(value) for value in sent.tolist()), True
    counted = [activity.projections[p.name].events for p in outgoing if p.name in activity.projections]
    if counted:
        # Projections may read different ports; the busiest one gives the messages.
        return max(counted) / (size * activity.batch * activity.steps), True
    return 1.0, False


def pooled_demand(graph: SpikingGraph, name: str = "the network") -> PooledDemand:
    """What a graph of Xylo takes of its chip's pools: channels, neurons, synapses and fan-outs.

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
    at = {"fanout": _neuron_of(network, int(fanout.argmax()))} if len(recurrent) else {}
    return PooledDemand(name, used, at)


def _neuron_of(network: XyloNetwork, number: int) -> str:
    population, first = next((p, first) for p, first in reversed(network.hidden) if first <= number)
    return f"neuron {number - first} of population {quoted(population.name)}"
