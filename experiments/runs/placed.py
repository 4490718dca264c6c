"""A deployment's plan on the cores of its chip: placement, time per token, messages seen, and joules that follow from them.

All segments are placed together, one layer of the placement for each layer of `Deployed.counts()`. Which neurons send how
often is measured on a few held-out tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from experiments.runs.deployment import per_token
from hardware.energy.account import Counts, EnergyReport, Profile, account, load_profile
from hardware.energy.breakeven import break_even, standings
from hardware.latency import on_chip
from hardware.latency.estimate import Latency, estimate
from hardware.latency.rates import list_rates, load_rates
from hardware.placement import LayerDemand, LayerPlacement, Placement, place
from neuro.conversion.plan import Plan, Segment
from neuro.deployment import coding, networks, networks_over_time, segments
from neuro.deployment.deployed import Deployed
from neuro.graph.demand import layer_demands
from neuro.simulators.activity import Activity
from neuro.simulators.fixed_point import run_pipelined

HOST_PROFILE = "digital45_int8_sram"
TURNS = on_chip.Turns(
    pipelined=True,
    said="({rates}, tokens pipelined, none waiting for the host): no longer dynamic energy alone",
)
HOST_TIME = "host: attention, norms and the ways between host and chip take time that is not modelled"


@dataclass(frozen=True)
class Placed:
    """Where the layers sit and how long they take, or why that is not known.

    `placement`: its layers are those of the counts. `messages`: "segment population" -> messages (batch, steps, neurons) of
    what sends into synapses, on the tokens that were measured.
    """

    placement: Placement | None
    placement_reason: str = ""
    latencies: tuple[Latency, ...] = ()
    latency_reason: str = ""
    messages: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def record(self) -> dict[str, Any]:
        """Keys of `deploy.json`; a reason stands beside what is None."""
        found: dict[str, Any] = {"placement": None, "latency": None}
        if self.placement is None:
            found["placement_reason"] = self.placement_reason
        else:
            found["placement"] = self.placement.to_dict()
        if self.latencies:
            found["latency"] = [latency.to_dict() for latency in self.latencies]
        else:
            found["latency_reason"] = self.latency_reason
        return found


def with_time_steps(counts: Sequence[Counts], plan: Plan) -> list[Counts]:
    """Counts whose layers on the chip say how many steps a token takes them."""
    steps = max(map(_steps, plan.segments))
    return [item if item.host else replace(item, time_steps=steps) for item in counts]


def _steps(segment: Segment) -> int:
    """Steps that one token takes a segment: of a token that is a whole sample, those of all its rows."""
    return segment.time_steps * max(1, math.ceil(segment.rows_per_token))


def put_on_cores(
    deployed: Deployed, counts: Sequence[Counts], windows_NT: Tensor, chip: str, chips: int | None = None
) -> Placed:
    """Place a plan's segments together and estimate the time of its layers.

    Args:
        deployed: on the simulator; it runs `windows_NT` once more, which adds to its counts.
        counts: of its layers on the chip, with their time steps.
        windows_NT: tokens for the messages of each neuron, int64 (N, T).
        chip: name or path of a chip file.
        chips: chips there are; None for as many as it takes.
    """
    inputs = inputs_of(deployed, windows_NT)
    runs = {s.name: activity_of(s, inputs[s.name]) for s in deployed.segments}
    messages = {
        f"{s.name} {name}": sent
        for s in deployed.segments
        for name, sent in runs[s.name].spikes.items()
        if s.graph.outgoing(name)
    }
    demands, groups = _demands(deployed, runs)
    try:
        placement = _joined(place(demands, chip, chips), groups)
    except ValueError as failure:  # DoesNotFit, or a chip without budgets
        reason = str(failure)
        return Placed(None, reason, (), f"no placement: {reason}", messages)
    names = [name for name in list_rates() if load_rates(name).chip == placement.chip]
    series = _series(deployed.plan, demands)
    said = (
        f"assumes: the {len(deployed.segments)} segments run one after another, as the host calls them"
        f" ({series} steps from a token's first to its last)"
    )
    steps = counts[0].time_steps
    found = []
    for name in names:
        one = estimate(counts, placement, load_rates(name), layers_in_series=series - (steps - 1))
        found.append(replace(one, labels=(*one.labels, said), unknown=(*one.unknown, HOST_TIME)))
    return Placed(placement, "", tuple(found), "" if found else f"no rates of chip {placement.chip}", messages)


def inputs_of(deployed: Deployed, windows_NT: Tensor) -> dict[str, Tensor]:
    """What the first layer of every segment is given: the first call of each."""
    seen: dict[str, Tensor] = {}
    handles = []
    for segment in deployed.segments:

        def keep(_: nn.Module, given: tuple[Tensor, ...], name: str = segment.name) -> None:
            seen.setdefault(name, given[0].detach())

        first = segment.modules[0]
        part = deployed.module.get_submodule(first) if first else deployed.module
        handles.append(part.register_forward_pre_hook(keep))
    try:
        with torch.no_grad():
            deployed(windows_NT)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def activity_of(segment: Segment, x: Tensor) -> Activity:
    """A segment's graph from rest, with every message kept, on what its layer is given: float (..., n_in), or the samples
    of a network."""
    if segment.stages:
        over_time = segment.code != "graded"
        inputs = (networks_over_time if over_time else networks).encode(segment, x)[0]
    elif segment.code == "graded":
        inputs = segments.encode(segment, x.reshape(-1, segment.n_in))[0]
    elif segment.code == "delta":
        ordered = x.movedim(segment.sequence_dim, -2) if x.dim() > 2 else x[None]
        inputs = coding.encode(segment, ordered.reshape(-1, *ordered.shape[-2:]))[0]
    else:
        inputs = coding.encode(segment, x)[0]
    return run_pipelined(segment.graph, inputs, record=("spikes",))


@dataclass(frozen=True)
class _Group:
    """A layer of the counts that several populations stand for: their names in the placement, and its messages per step
    that go into more than one of them, counted once too often each time.
    """

    members: tuple[str, ...]
    repeated: float


def _demands(deployed: Deployed, runs: Mapping[str, Activity]) -> tuple[list[LayerDemand], dict[str, _Group]]:
    """Demands of all segments under the names of the counts; a layer of several populations keeps theirs for now."""
    found: list[LayerDemand] = []
    groups: dict[str, _Group] = {}
    for segment, layers in zip(deployed.segments, deployed.layers, strict=True):
        prefix = f"{segment.name}/"
        mine = layer_demands(segment.graph, runs[segment.name], prefix)
        on_chip = {demand.name for demand in mine if demand.on_chip}
        names: dict[str, str] = {}
        for layer, populations in layers.items():
            members = tuple(prefix + name for name in populations if prefix + name in on_chip)
            if len(members) == 1:
                names[members[0]] = layer
            else:
                groups[layer] = _Group(members, _repeated(segment, populations, mine, prefix))
        for demand in mine:
            connections = tuple(replace(c, source=names.get(c.source, c.source)) for c in demand.connections)
            found.append(replace(demand, name=names.get(demand.name, demand.name), connections=connections))
    return found, groups


def _repeated(segment: Segment, populations: Sequence[str], demands: Sequence[LayerDemand], prefix: str) -> float:
    """The graded route counts a message into several groups of channels once, a placement once for each connection."""
    if segment.code != "graded":
        return 0.0
    sent = {demand.name: _messages(demand) for demand in demands}
    keys = [(p.source, p.port) for p in segment.graph.projections if p.target in populations]
    return sum(sent[prefix + source] for source, _ in keys) - sum(sent[prefix + source] for source, _ in set(keys))


def _messages(demand: LayerDemand) -> float:
    return sum(demand.rate) if isinstance(demand.rate, tuple) else demand.rate * demand.neurons


def _joined(placement: Placement, groups: Mapping[str, _Group]) -> Placement:
    """The placement with the populations of one layer of the counts under its name."""
    to = {member: layer for layer, group in groups.items() for member in group.members}
    if not to:
        return placement
    kept: dict[str, list[LayerPlacement]] = {}
    for layer in placement.layers:
        kept.setdefault(to.get(layer.name, layer.name), []).append(layer)
    cores = []
    for core in placement.cores:
        synops: dict[str, float] = {}
        for name, value in core.synops_of.items():
            synops[to.get(name, name)] = synops.get(to.get(name, name), 0.0) + value
        parts = tuple(replace(part, layer=to.get(part.layer, part.layer)) for part in core.parts)
        cores.append(replace(core, parts=parts, synops_of=synops))
    layers = tuple(_one(name, parts, groups[name].repeated) if name in groups else parts[0] for name, parts in kept.items())
    flows = tuple(replace(flow, layer=to.get(flow.layer, flow.layer)) for flow in placement.flows)
    shapes = {name: shape for name, shape in placement.shapes.items() if name not in to}
    return replace(placement, cores=tuple(cores), layers=layers, flows=flows, shapes=shapes)


def _one(name: str, parts: Sequence[LayerPlacement], repeated: float) -> LayerPlacement:
    return LayerPlacement(
        name=name,
        neurons=sum(part.neurons for part in parts),
        cores=tuple(sorted({number for part in parts for number in part.cores})),
        binding=max((part.binding for part in parts), key=lambda limit: limit.share),
        synops=sum(part.synops for part in parts),
        imbalance=max(part.imbalance for part in parts),
        partial_sums=any(part.partial_sums for part in parts),
        events=sum(part.events for part in parts) - repeated,
    )


def _series(plan: Plan, demands: Sequence[LayerDemand]) -> int:
    """Steps from a token's first to its last result: the host waits for each segment's last step before the next one."""
    depth: dict[str, int] = {}
    for demand in demands:  # a graph names its populations in any order
        depth[demand.name] = 0
    graph = {d.name: [c.source for c in d.connections if c.source != d.name] for d in demands if d.on_chip}
    for _ in range(max(len(s.graph.populations) for s in plan.segments)):  # feed-forward: settled after so many rounds
        for name, sources in graph.items():
            depth[name] = 1 + max((depth[source] for source in sources), default=0)
    total, at = 0, 0
    for segment in plan.segments:
        mine = demands[at : at + len(segment.graph.populations)]
        at += len(mine)
        total += max(depth[demand.name] for demand in mine) + _steps(segment) - 1
    return total


def price(counts: Sequence[Counts], profile: Profile, placed: Placed) -> EnergyReport:
    """Joules of layers on the chip; a profile of the chip that they were placed on also prices messages by where they go,
    hops, and static power over the modelled time.
    """
    return on_chip.price(counts, profile, placed.placement, placed.latencies, TURNS)


def extrapolated(counts: Sequence[Counts], placed: Placed) -> EnergyReport:
    """Loihi 2: scaled from one measured network, with static power where a time is modelled."""
    return on_chip.extrapolated(counts, placed.placement, placed.latencies, TURNS)


def host_energy(counts: Sequence[Counts]) -> dict[str, Any] | None:
    """What was counted on the host, as dense operations of a digital reference, per token; None for nothing."""
    host = [item for item in counts if item.host and item.dense_macs]
    if not host:
        return None
    report = account(host, load_profile(HOST_PROFILE))
    return per_token(report, "soft max, norms and look-ups beyond their dense MACs") | {"scope": "layers on the host"}


def thresholds(counts: Sequence[Counts], profiles: Sequence[Profile], placed: Placed) -> dict[str, Any]:
    """`break_even` of every chip profile against every dense one, and `standings` against published thresholds; empty
    lists for layers that sent nothing.
    """
    pairs = [(a, b) for a in profiles if a.costs == "spiking" for b in profiles if b.costs == "dense"]
    found: dict[str, Any] = {"break_even": [], "standings": []}
    if sum(item.synops for item in counts) and sum(item.dense_macs for item in counts):
        where = placed.placement
        found["break_even"] = [
            break_even(counts, a, b, placement=where if on_chip.of_chip(a, where) else None).to_dict() for a, b in pairs
        ]
        found["standings"] = [asdict(standing) for standing in standings(counts)]
    return found
