"""Counts on cores become time: per step, per token, pipelined or not, with what binds.

``step >= max over cores of ( neuron updates x t_d, synaptic operations x t_s, memory reads x t_r ), the heaviest link,
the barrier``: the max-affine form of Timcheck, Pierro and Shrestha, arXiv:2601.10035. Low end and middle are that
maximum: all terms overlap perfectly. The high end is the sum of a core's terms, the link and the barrier: nothing
overlaps. Counts are averages over steps; a busier step takes longer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hardware.chips.chip import load_chip
from hardware.chips.mesh import Mesh
from hardware.energy.counts import Counts, check_counts
from hardware.interval import Interval, largest, total
from hardware.latency.rates import Rates
from hardware.placement.report import Core, Placement
from hardware.placement.routing import depth, heaviest_link
from hardware.text import quoted

WORD_BITS = 32
"""A spike message is one word; a graded payload adds words of so many bits."""


class CoreCounter(Protocol):
    """What a simulator counts per core over all steps and samples; ``neuro.simulators.activity.CoreCounts`` fits."""

    @property
    def spikes(self) -> int: ...
    @property
    def synops(self) -> int: ...
    @property
    def neuron_updates(self) -> int: ...


@dataclass(frozen=True)
class CoreWork:
    """Work of one core in an average step.

    Attributes:
        neuron_active, neuron_inactive: updates that send a message, and that send none.
        synops: synaptic operations.
        messages_in, messages_out: messages that arrive at its axons, and that it sends (one per receiving core).
        memory_reads: 64-bit words of synaptic memory fetched.
    """

    neuron_active: float
    neuron_inactive: float
    synops: float
    messages_in: float
    messages_out: float
    memory_reads: float


@dataclass(frozen=True)
class Latency:
    """Time of a network on its cores.

    Attributes:
        rates, source: the rate file and its source.
        step: time of one step.
        terms: neuron, synapse, message_out, memory (each of its busiest core), link, barrier.
        binding: the term that sets the middle value, and ``core``, the core that sets it (None for link and barrier).
        depth: layers in series.
        time_steps: steps of one token.
        unknown: what takes time and is not in it; every time is then a lower bound.
        labels: what the figure takes for granted.
        core_us: core -> microseconds of its busiest term, middle value.
    """

    rates: str
    source: str
    step: Interval
    terms: Mapping[str, Interval]
    binding: str
    core: int | None
    depth: int
    time_steps: int
    unknown: tuple[str, ...]
    labels: tuple[str, ...]
    core_us: Mapping[int, float]

    @property
    def lower_bound(self) -> bool:
        """Whether something that takes time is missing."""
        return bool(self.unknown)

    @property
    def token(self) -> Interval:
        """From a token's first step to its last result: depth + time_steps - 1 steps."""
        return self.step * (self.depth + self.time_steps - 1)

    def run(self, tokens: int, *, pipelined: bool = True) -> Interval:
        """Time of so many tokens.

        Args:
            tokens: how many.
            pipelined: a token enters as soon as the one before has left the first layer; else when its result is out.

        Raises:
            ValueError: no token.
        """
        if tokens < 1:
            raise ValueError(f"a run of {tokens} tokens takes no time that could be computed; at least 1 is needed")
        steps = tokens * self.time_steps + self.depth - 1 if pipelined else tokens * (self.depth + self.time_steps - 1)
        return self.step * steps

    def tokens_per_second(self, *, pipelined: bool = True) -> tuple[float, float, float]:
        """Throughput, (low, mid, high): low belongs to the longest time."""
        one = self.step * self.time_steps if pipelined else self.token
        low_s, mid_s, high_s = one.to("s")
        return tuple(1 / s if s else math.inf for s in (high_s, mid_s, low_s))  # type: ignore[return-value]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; times in microseconds as [low, mid, high]."""
        return {
            "rates": self.rates,
            "source": self.source,
            "kind": "modelled",
            "step_us": list(self.step.to("us")),
            "token_us": list(self.token.to("us")),
            "tokens_per_s_pipelined": list(self.tokens_per_second()),
            "tokens_per_s_one_by_one": list(self.tokens_per_second(pipelined=False)),
            "terms_us": {name: list(time.to("us")) for name, time in self.terms.items()},
            "binding": self.binding,
            "core": self.core,
            "depth": self.depth,
            "time_steps": self.time_steps,
            "lower_bound": self.lower_bound,
            "unknown": list(self.unknown),
            "labels": list(self.labels),
        }


def estimate(
    counts: Sequence[Counts],
    placement: Placement,
    rates: Rates,
    *,
    core_counts: Mapping[int, CoreCounter] | None = None,
    layers_in_series: int | None = None,
) -> Latency:
    """Time of ``counts`` on ``placement``.

    Args:
        counts: one record per layer; layers on the host are left out.
        placement: of the same layers.
        rates: from :func:`hardware.latency.rates.load_rates`, of the placement's chip.
        core_counts: core number -> counters of a simulation over the same tokens; without them a layer's counts are
            spread over its cores by neurons and synapses.
        layers_in_series: steps from the first layer to the last; None takes the placement's longest way.

    Raises:
        ValueError: counts that do not belong together or are not placed, rates of another chip, a chip without a mesh,
            no layer on the chip.
    """
    check_counts(counts)
    mine = [item for item in counts if not item.host]
    if not mine:
        raise ValueError("every layer runs on the host: the chip takes no time")
    if placement.chip != rates.chip:
        raise ValueError(f"rates {quoted(rates.name)} are of {rates.chip}, the placement is on {placement.chip}")
    mesh = load_chip(placement.chip).mesh
    if mesh is None:
        raise ValueError(f"chip {quoted(placement.chip)} has no mesh: its links are not known")
    work = core_work(mine, placement, core_counts)
    per_core = {number: _core_terms(item, rates) for number, item in work.items()}
    terms = {
        name: largest((own[name] for own in per_core.values()), "us")
        for name in ("neuron", "synapse", "message_out", "memory")
        if all(name in own for own in per_core.values())
    }
    terms["link"] = _link(mine, placement, rates, mesh)
    tiles = {(core.chip, mesh.tile(core.slot)) for core in placement.cores}
    terms["barrier"] = rates.barrier_time(len(tiles))
    busiest = largest(terms.values(), "us")
    slowest = largest((total(own.values(), "us") for own in per_core.values()), "us")
    high = (slowest + terms["link"] + terms["barrier"]).high
    binding = max(terms, key=lambda name: terms[name].to("us")[1])
    core = (
        max(per_core, key=lambda n: per_core[n][binding].to("us")[1]) if binding in next(iter(per_core.values())) else None
    )
    step = Interval(busiest.low, busiest.mid, high)
    return Latency(
        rates=rates.name,
        source=rates.source,
        step=step,
        terms=terms,
        binding=binding,
        core=core,
        depth=depth(placement) if layers_in_series is None else layers_in_series,
        time_steps=mine[0].time_steps,
        unknown=(*(f"{term}: {rate.note}" for term, rate in rates.rates.items() if rate.time is None), *rates.not_modelled),
        labels=_labels(rates, placement, step, core_counts is not None),
        core_us={n: max(time.to("us")[1] for time in own.values()) for n, own in per_core.items()},
    )


def core_work(
    counts: Sequence[Counts], placement: Placement, core_counts: Mapping[int, CoreCounter] | None = None
) -> dict[int, CoreWork]:
    """Core number -> its work in an average step.

    Raises:
        ValueError: a layer that is not in the placement, a counter of a core that is not.
    """
    layers = {layer.name: layer for layer in placement.layers}
    sums: dict[int, list[float]] = {core.number: [0.0] * 6 for core in placement.cores}
    scale: dict[str, float] = {}
    for item in counts:
        if item.layer not in layers:
            raise ValueError(f"layer {quoted(item.layer)} is counted but not in the placement; place what was counted")
        steps, layer = item.tokens * item.time_steps, layers[item.layer]
        scale[item.layer] = item.events / steps / layer.events if layer.events else 0.0
        whole = math.fsum(placement.cores[n].synops_of[item.layer] for n in layer.cores)
        for number in layer.cores:
            own, core = sums[number], placement.cores[number]
            share = _neurons(core, item.layer) / layer.neurons
            own[0] += item.neuron_updates_active / steps * share
            own[1] += item.neuron_updates_inactive / steps * share
            own[2] += item.synops / steps * (core.synops_of[item.layer] / whole if whole else share)
    sends = {flow.source for flow in placement.flows}
    for flow in placement.flows:
        messages = flow.messages * scale.get(flow.layer, 0.0)
        sums[flow.target][3] += messages
        if flow.source >= 0:
            sums[flow.source][4] += messages
    for number, own in sums.items():
        if number not in sends:
            own[4] = own[0]  # nothing on the chip listens: one message to the host per active neuron
        own[5] = own[3] * _words_per_axon(placement.cores[number])
    if core_counts is not None:
        steps = counts[0].tokens * counts[0].time_steps
        for number, counter in core_counts.items():
            if number not in sums:
                raise ValueError(f"core {number} was counted but is not in the placement, which has {len(sums)} cores")
            sums[number][:3] = [
                counter.spikes / steps,
                max(0, counter.neuron_updates - counter.spikes) / steps,
                counter.synops / steps,
            ]
    return {number: CoreWork(*own) for number, own in sums.items()}


def _neurons(core: Core, layer: str) -> int:
    """Neurons of a layer that this core updates; those of a partial sum are neurons of their own."""
    return sum(part.neurons for part in core.parts if part.layer == layer)


def _words_per_axon(core: Core) -> float:
    axons, words = core.used.get("axon_in"), core.used.get("synapse_words")
    return words.used / axons.used if axons is not None and words is not None and axons.used else 0.0


def _core_terms(work: CoreWork, rates: Rates) -> dict[str, Interval]:
    def time(*pairs: tuple[str, float]) -> Interval:
        known = ((rates.rates[name].time, count) for name, count in pairs if name in rates.rates)
        return total((rate * count for rate, count in known if rate is not None), "us")

    found = {
        "neuron": time(("neuron_active", work.neuron_active), ("neuron_inactive", work.neuron_inactive)),
        "synapse": time(("synapse", work.synops), ("message_in", work.messages_in)),
        "message_out": time(("message_out", work.messages_out)),
    }
    if "memory_read" in rates.rates and rates.rates["memory_read"].time is not None:
        found["memory"] = time(("memory_read", work.memory_reads))
    return found


def _link(counts: Sequence[Counts], placement: Placement, rates: Rates, mesh: Mesh) -> Interval:
    events = {layer.name: layer.events for layer in placement.layers}
    weights = {}
    for item in counts:
        words = 1 + (math.ceil(item.payload_bits / WORD_BITS) if item.payload_bits > 1 else 0)
        per_step = item.events / (item.tokens * item.time_steps)
        weights[item.layer] = words * per_step / events[item.layer] if events[item.layer] else 0.0
    loads = heaviest_link(placement, mesh, weights)
    known = [(rates.rates[name].time, load) for name, load in zip(("hop_ew", "hop_ns"), loads, strict=True)]
    return largest((rate * load for rate, load in known if rate is not None), "us")


def _labels(rates: Rates, placement: Placement, step: Interval, counted: bool) -> tuple[str, ...]:
    labels = [f"assumes: {assumption}" for assumption in rates.assumptions]
    labels.append(
        f"assumes: cores of the {placement.chip} placement ({placement.budget}) fill the mesh column by column of tiles"
    )
    if not counted:
        labels.append("assumes: a layer's work spreads over its cores by neurons and synapses (no counters per core given)")
    low, _, high = rates.published_steps.to("us")
    if not low <= step.to("us")[1] <= high:
        labels.append(
            f"outside the {low:g} to {high:g} us per step published for this chip: {step.to('us')[1]:.3g} us"
            f" ({rates.published_source})"
        )
    return tuple(labels)
