"""Seconds of collective operations: latency of rings and trees, and bytes over the slowest link on the way.

The form and the latencies are those of NCCL's own tuning model (``collectives/nccl.yaml``): a latency for each hop, a share
of the bus for each protocol, and the protocol that is fastest. A ring of n ranks moves (n - 1) / n of the data past each of
them, twice for an all-reduce; a tree, which only all-reduce has, goes up and down, in log2(nodes) hops between nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from hardware import datafile
from hardware.clusters.machines import End, Machine
from hardware.datafile import DataFileError

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]


@dataclass(frozen=True)
class Group:
    """Ranks that communicate: `ranks` in all, `per_node` of them in each node."""

    ranks: int
    per_node: int

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.per_node < 1 or self.ranks % self.per_node:
            raise DataFileError(f"a group of {self.ranks} ranks, {self.per_node} in a node: whole nodes are needed")

    @property
    def nodes(self) -> int:
        return self.ranks // self.per_node


@dataclass(frozen=True)
class Protocol:
    """Latencies in microseconds, and the share of the bus that the payload gets."""

    base_us: float
    nvlink_us: float
    network_us: float
    bandwidth: float
    several_nodes_nvlink: float

    def latency_s(self, inside: float, between: float, several: bool) -> float:
        nvlink = self.nvlink_us * (self.several_nodes_nvlink if several else 1.0)
        return 1e-6 * (self.base_us + inside * nvlink + between * self.network_us)


@cache
def protocols() -> dict[str, dict[str, Protocol]]:
    """ "ring" and "tree" -> protocol -> its constants. Raises DataFileError for a damaged file."""
    where, entry = datafile.opened("nccl", "collectives", ("source", "date", "ring", "tree"))
    return {shape: {name: _protocol(f"{where}: {shape}.{name}", raw) for name, raw in entry[shape].items()}
            for shape in ("ring", "tree")}  # fmt: skip


def _protocol(where: str, raw: Any) -> Protocol:
    keys = ("base_us", "nvlink_us", "network_us", "bandwidth", "several_nodes_nvlink")
    entry = datafile.check_keys(where, raw, keys)
    return Protocol(**{key: datafile.number(f"{where}: {key}", entry[key]) for key in keys})


def bus_gb_s(machine: Machine, group: Group, end: End) -> float:
    """Gigabytes per second past each rank: NVLink inside a node; between nodes the cards of the ranks that take part, or
    NVLink where that is slower."""
    nvlink = machine.at("nvlink_gb_s", end) * machine.at("nvlink_share", end)
    if group.nodes == 1:
        return nvlink
    cards = group.per_node * machine.at("nic_gb_s", end) * machine.at("network_share", end)
    return min(nvlink, cards) if group.per_node > 1 else cards


def moved_bytes(kind: Kind, total_bytes: float, group: Group) -> float:
    """Bytes that each rank sends in a ring: of `total_bytes`, the whole (gathered or reduced) tensor."""
    return (2 if kind == "all_reduce" else 1) * total_bytes * (group.ranks - 1) / group.ranks


def seconds(kind: Kind, total_bytes: float, group: Group, machine: Machine, end: End = "mid") -> float:
    """The fastest protocol's time for a tensor of `total_bytes` (the whole one) over a group; 0 for a group of one."""
    if group.ranks == 1:
        return 0.0
    bus = 1e9 * bus_gb_s(machine, group, end)
    rounds = 2 if kind == "all_reduce" else 1
    several = group.nodes > 1
    between = rounds * (group.nodes - 1)
    inside = rounds * (group.ranks - 1) - between
    moved = moved_bytes(kind, total_bytes, group)
    found = [
        protocol.latency_s(inside, between, several) + moved / (bus * protocol.bandwidth)
        for protocol in protocols()["ring"].values()
    ]
    if kind == "all_reduce":
        hops = 2 * (group.per_node - 1), 2 * math.ceil(math.log2(group.nodes)) if several else 0
        found += [
            protocol.latency_s(*hops, several) + 2 * total_bytes / (bus * protocol.bandwidth)
            for protocol in protocols()["tree"].values()
        ]
    return min(found)


def busy(machine: Machine, group: Group, end: End) -> float:
    """Share of the GPU that a running collective of this group takes from computation."""
    return machine.at("nvlink_busy" if group.nodes == 1 else "network_busy", end)
