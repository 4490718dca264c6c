"""What a network of convolutions would take if every convolutional layer were a dense matrix.

Counted on a few samples: each message into a layer then works a synapse at every neuron of it, and every zero of the matrix
is stored. Pools and ways around a layer stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from experiments.runs.placed import activity_of, inputs_of
from hardware.energy.account import Counts, account, load_profile
from hardware.placement import Connection, place
from neuro.deployment.deployed import Deployed
from neuro.graph.demand import layer_demands

PROFILE = "loihi1_davies2018"


@dataclass(frozen=True)
class Equivalent:
    """The same network with convolutions (`own`) and with dense matrices in their place (`dense`).

    `cores`: None where it does not fit, `reason` says why. `synops`, per sample. `energy_j`: (low, middle, high) a sample
    by the figures of Davies et al. 2018, messages by rule of thumb, so that both are alike.
    """

    cores: dict[str, int | None]
    synops: dict[str, float]
    energy_j: dict[str, tuple[float, float, float]]
    reason: str = ""

    def record(self) -> dict[str, Any]:
        """JSON form."""
        return {"cores": self.cores, "synops_per_sample": self.synops, "energy_j": self.energy_j, "reason": self.reason}


def dense_equivalent(simulated: Deployed, samples: Tensor, counts: Sequence[Counts], chip: str) -> Equivalent:
    """Compare, on some samples that the simulated model runs once more.

    Args:
        simulated: on the simulator; its counts grow.
        samples: float (N, ...), a few.
        counts: of its layers on the chip, over any number of samples, for all that does not change.
        chip: name or path of a chip file.
    """
    given = inputs_of(simulated, samples)
    own, dense = [], []
    work = {"own": 0.0, "dense": 0.0}
    for segment in simulated.segments:
        activity, graph = activity_of(segment, given[segment.name]), segment.graph
        layers = {link.projection for stage in segment.stages for link in stage.links if link.has_layer}
        sizes = {p.name: p.size for p in graph.populations}
        for population, demand in zip(graph.populations, layer_demands(graph, activity, f"{segment.name}/"), strict=True):
            full = tuple(
                Connection(c.source, sizes[p.source], c.weight_bits) if p.kind == "conv" and p.name in layers else c
                for p, c in zip(graph.incoming(population.name), demand.connections, strict=True)
            )
            own.append(demand)
            dense.append(replace(demand, connections=full))
        for projection in graph.projections:
            found = activity.projections[projection.name]
            widened = projection.kind == "conv" and projection.name in layers
            work["own"] += found.synops
            work["dense"] += found.events * sizes[projection.target] if widened else found.synops
    cores: dict[str, int | None] = {}
    reason = ""
    for name, demands in (("own", own), ("dense", dense)):
        try:
            cores[name] = len(place(demands, chip).cores)
        except ValueError as failure:  # DoesNotFit, or a chip without budgets
            cores[name], reason = None, str(failure)
    synops = {name: value / len(samples) for name, value in work.items()}
    energy = {name: _energy(counts, value) for name, value in synops.items()}
    return Equivalent(cores, synops, energy, reason)


def _energy(counts: Sequence[Counts], synops: float) -> tuple[float, float, float]:
    """Joules of a sample with so many synaptic operations, all else as counted."""
    tokens = counts[0].tokens
    whole = Counts(
        layer="all",
        tokens=tokens,
        synops=round(synops * tokens),
        events=sum(c.events for c in counts),
        neuron_updates_active=sum(c.neuron_updates_active for c in counts),
        neuron_updates_inactive=sum(c.neuron_updates_inactive for c in counts),
        dense_macs=sum(c.dense_macs for c in counts),
        weight_bytes=sum(c.weight_bytes for c in counts),
        graded=True,
        payload_bits=max(c.payload_bits for c in counts),
    )
    found = account([whole], load_profile(PROFILE)).to_dict()
    return found["low_j"] / tokens, found["mid_j"] / tokens, found["high_j"] / tokens
