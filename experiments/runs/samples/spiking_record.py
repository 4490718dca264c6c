"""The record of a deployment by route lif, with the same keys as the other routes have."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn

from experiments.runs.samples.outcome import Outcome, answered
from experiments.runs.samples.spiking import LIF, LifConfig, Spiking
from experiments.samples.records import Samples


def spiking_outcome(model: nn.Module, samples: Samples, found: Spiking, cfg: LifConfig, *, chip: str, name: str) -> Outcome:
    """Judged answers and the account of a spiking network as an outcome."""
    account, network = found.account, found.network
    counts = [*account.counts]
    placed = account.placement
    per_sample = account.to_dict()
    energies = [
        one | {"per": "sample", "profile": " ".join(filter(None, (one["profile"], one["dense"])))}
        for one in per_sample["energy"]
    ]
    breaks = [pair for often in per_sample["break_even"].values() for pair in often]
    macs = account.total("dense_macs")
    counted = f"counts, cores, joules and times are of {found.samples} of the {len(samples.x):,} held-out samples"
    document = {
        **answered(model, samples, found.judged, name, chip, LIF),
        "settings": asdict(cfg),
        "mapped_mac_share": 1.0,
        "macs_per_sample": macs,
        "mapped_macs_per_sample": macs,
        "host_crossings_per_sample": 2.0 * int(samples.x.shape[1]),
        "events_per_sample": account.total("events"),
        "synops_per_sample": account.total("synops"),
        "synops_fraction": account.total("synops") / max(1.0, macs),
        "neuron_updates_per_sample": account.total("neuron_updates"),
        "time_steps_per_sample": account.activity.steps,
        "max_payload_bits": max(c.payload_bits for c in counts),
        "cores": None if placed is None else len(placed.cores),
        "chips": None if placed is None else placed.chips,
        "layers": [_layer(one) for one in per_sample["populations"]],
        "compatibility": "all of it: layers of neurons and the synapses into them are one graph",
        "conversion": network.table(),
        "energy": energies,
        "placement": per_sample["placement"],
        "placement_reason": account.placement_reason,
        "latency": per_sample["latency"] or None,
        "latency_reason": account.latency_reason,
        "host_energy": None,
        "break_even": breaks,
        "standings": per_sample["standings"],
        "clipped_inputs": found.clipped_inputs,
        "saturations": found.clips,
        "wraps": found.wraps,
        "health": [],
        "check": None if network.check is None else asdict(network.check),
        "notes": [*samples.notes, *network.notes, counted],
    }
    return Outcome(found.judged, counts, placed, account.activity.spikes, None, network.graph, document)


def _layer(population: dict[str, Any]) -> dict[str, Any]:
    """A population as a layer's counts are written."""
    return {
        "layer": population["name"],
        "kind": population["kind"],
        "neurons": population["neurons"],
        "host": False,
        "weight_bytes": population["weight_bytes"],
        "payload_bits": population["payload_bits"],
        **{
            f"{field}_per_sample": population[field]
            for field in ("synops", "events", "neuron_updates_active", "neuron_updates_inactive", "dense_macs")
        },
    }
