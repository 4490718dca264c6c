"""What a graph costs on an input: run, counted, placed, priced and timed, with the source of every figure.

    found = graph_account(graph, {"x": spikes}, chip="loihi1")
    print(found.table())

Counts are counted in the simulation. Cores, joules and microseconds are modelled from them by the budgets, profiles and
rates of `hardware`; no chip was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hardware.chips.chip import Chip, load_chip
from hardware.chips.pooled import PooledChip, is_pooled, load_pooled
from hardware.energy.account import account, list_profiles, load_profile
from hardware.energy.breakeven import BreakEven, Standing, break_even, standings
from hardware.energy.counts import Counts
from hardware.energy.measured_networks import Network, load_networks
from hardware.energy.profile import Profile
from hardware.energy.report import EnergyReport
from hardware.latency import on_chip
from hardware.latency.estimate import Latency, estimate
from hardware.latency.rates import list_rates, load_rates
from hardware.placement import DoesNotFit, Placement, place
from hardware.placement.pooled import PooledPlacement, place_pooled
from hardware.text import quoted
from neuro.accounting.counts import (
    Zeros,
    counts_per_core,
    every_step,
    graph_counts,
    measured_demands,
    sparse_where_it_pays,
    zero_weights,
)
from neuro.accounting.running import CountedRun, counted_run
from neuro.accounting.table import account_table
from neuro.graph.demand import pooled_demand
from neuro.graph.kinds import XYLO_KINDS
from neuro.graph.network import SpikingGraph
from neuro.simulators.activity import Activity
from neuro.simulators.inputs import Integers
from neuro.simulators.schedule import components
from neuro.simulators.support import default_mode

REFERENCE = "digital45_int8_sram"
UNPRICED = (
    "no energy or time of this network: no constants per operation of Xylo are published, and one measured network scales"
    " to no other. A message counts once, and carries up to 31 spikes"
)
TURNS = on_chip.Turns(pipelined=False, said="({rates}, samples one after another)")
"""Neurons keep state, so that the next sample waits for the last result."""
ONCE, EACH = "once a sample", "every step"
"""How often the dense equivalent is evaluated. A graph with loops has no equivalent that runs once a sample."""


@dataclass(frozen=True)
class PricedEnergy:
    """Joules of one profile. `dense`: "" for a chip, else how often the dense equivalent is evaluated."""

    report: EnergyReport
    dense: str = ""

    @property
    def per_sample_j(self) -> tuple[float, float, float]:
        """(low, mid, high) joules."""
        report = self.report
        low, mid, high = (report.total_low_j, report.total_mid_j, report.total_high_j)
        return low / report.tokens, mid / report.tokens, high / report.tokens

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: joules per sample."""
        report, samples = self.report, self.report.tokens
        groups = {name: [value / samples for value in triple] for name, triple in report.by_group().items()}
        low, mid, high = self.per_sample_j
        return {
            "profile": report.profile,
            "dense": self.dense,
            "low_j": low,
            "mid_j": mid,
            "high_j": high,
            "kind": report.kind,
            "lower_bound": report.lower_bound,
            "source": report.source,
            "groups": groups,
            "missing": dict(report.missing),
            "unknown": list(report.unknown),
            "labels": list(report.labels),
        }


@dataclass(frozen=True)
class GraphAccount:
    """What `graph_account` found.

    Attributes:
        graph: as it was counted (see `zeros`). activity: counts of its run, and the messages of its outputs.
        counts: one record per population that computes; their tokens are samples.
        zeros: what became of the zero weights of dense projections.
        placement: on the chip, or None, and `placement_reason` says why.
        energies: of each chip profile, then of the dense equivalent.
        latencies: one for each rate file of the chip; none where `latency_reason` says why.
        break_evens: how often the dense equivalent is evaluated -> one record for each chip profile.
        break_even_reason: why there is none, or "".
        standings: the network against published thresholds.
        pools: what of a chip of fixed pools it takes, None on a chip of cores.
        published: networks with published measurements on that chip's family; nothing is scaled from them.
    """

    graph: SpikingGraph
    activity: Activity
    counts: tuple[Counts, ...]
    zeros: tuple[Zeros, ...]
    placement: Placement | None
    placement_reason: str
    energies: tuple[PricedEnergy, ...]
    latencies: tuple[Latency, ...]
    latency_reason: str
    break_evens: Mapping[str, tuple[BreakEven, ...]]
    break_even_reason: str
    standings: tuple[Standing, ...]
    pools: PooledPlacement | None = None
    published: tuple[Network, ...] = ()

    @property
    def samples(self) -> int:
        """Samples that were run."""
        return self.activity.batch

    def total(self, field: str) -> float:
        """One field of `Counts`, all populations together, per sample."""
        return sum(getattr(item, field) for item in self.counts) / self.samples

    def table(self) -> str:
        """All of it as text."""
        return account_table(self)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; counts and joules per sample, times in microseconds."""
        fields = ("synops", "events", "neuron_updates_active", "neuron_updates_inactive", "dense_macs")
        placed = self.placement
        cores = {} if placed is None else {layer.name: len(layer.cores) for layer in placed.layers}
        return {
            "samples": self.samples,
            "steps": self.activity.steps,
            "ran_on": self.activity.ran_on,
            "mode": self.activity.mode,
            "per_sample": {field: self.total(field) for field in fields},
            "energy": [energy.to_dict() for energy in self.energies],
            "latency": [latency.to_dict() for latency in self.latencies],
            "latency_reason": self.latency_reason,
            "break_even": {often: [one.to_dict() for one in found] for often, found in self.break_evens.items()},
            "break_even_reason": self.break_even_reason,
            "populations": [
                {
                    "name": item.layer,
                    "neurons": self.graph.population(item.layer).size,
                    "kind": self.graph.population(item.layer).kind,
                    "cores": cores.get(item.layer),
                    **{field: getattr(item, field) / self.samples for field in fields},
                    "weight_bytes": item.weight_bytes,
                    "payload_bits": item.payload_bits,
                }
                for item in self.counts
            ],
            "zeros": [asdict(entry) for entry in self.zeros],
            "placement": None if placed is None else placed.to_dict(),
            "placement_reason": self.placement_reason,
            "standings": [asdict(standing) for standing in self.standings],
            "pools": None if self.pools is None else self.pools.to_dict(),
            "published": [
                {
                    "network": network.title,
                    "source": network.source,
                    "measured": {name: str(value.mid) for name, value in network.measured.items()},
                }
                for network in self.published
            ],
            "notes": list(self.activity.notes),
        }


def graph_account(
    graph: SpikingGraph,
    inputs: Mapping[str, Integers],
    *,
    chip: str | Path | Chip | PooledChip | None = None,
    chips: int | None = None,
    profiles: Sequence[str | Path] | None = None,
    reference: str | Path = REFERENCE,
    zeros: str = "auto",
    mode: str | None = None,
    steps: int | None = None,
    device: torch.device | str | None = None,
) -> GraphAccount:
    """Run a graph on an input and account for it.

    Args:
        graph: any graph: made by hand, converted, or imported.
        inputs: integers (batch, steps, size) per input population, as `fixed_point.simulate` takes them.
        chip: name of a shipped chip, path of a chip file, or a record; None: loihi2, or xylo_audio2 for Xylo's kinds.
        chips: of cores, as many as there are; None for any number.
        profiles: names or paths of energy profiles; None takes every shipped one that prices a chip, and none for Xylo's
            kinds, of which no energy per event is published: what was measured of other networks is named. On Loihi 2
            joules scaled from one measured network are added. Dense profiles price the dense equivalent.
        reference: the dense profile of the dense equivalent and of the break-even.
        zeros: "auto" or "stored" (`neuro.accounting.counts.ZEROS`).
        mode, device, steps: of the simulation; mode None takes the one of the graph's kinds, `steps` is for a graph without
            input populations.

    Raises:
        InputError, GraphError, ValueError: as `fixed_point.simulate`; a profile of the wrong kind.
        hardware.placement.DoesNotFit: the graph needs more than `chips` chips, or more than the chip has of something.
        FileNotFoundError, DataFileError: of a chip or profile.
    """
    own = all(population.kind not in XYLO_KINDS for population in graph.populations)  # events as Loihi's profiles price
    target = _target(chip, own)
    pools = None
    if isinstance(target, PooledChip):
        if chips is not None:
            raise ValueError(f"chips is {chips}; {target.title} has fixed pools and holds one network, so leave it out")
        pools = place_pooled(pooled_demand(graph), target)
    shipped = [name for name in list_profiles() if own and load_profile(name).costs == "spiking"]
    chosen = [load_profile(name) for name in (shipped if profiles is None else profiles)]
    digital = load_profile(reference)
    if digital.costs != "dense":
        raise ValueError(f"reference {quoted(digital.name)} prices a chip; a dense profile is needed, such as {REFERENCE}")
    counted = sparse_where_it_pays(graph, zeros)
    how = default_mode(counted, "fixed_point") if mode is None else mode
    run = counted_run(counted, inputs, mode=how, steps=steps, device=device)
    counts = graph_counts(counted, run.activity)
    placement: Placement | None = None
    latencies: tuple[Latency, ...] = ()
    why_not_placed, why_not_timed = "", UNPRICED
    if not isinstance(target, PooledChip):
        placement, why_not_placed = _placed(counted, run, target, chips)
        latencies, why_not_timed = _timed(counted, run, counts, placement)
    chip_profiles = [profile for profile in chosen if profile.costs == "spiking"]
    dense_profiles = {profile.name: profile for profile in chosen if profile.costs == "dense"} | {digital.name: digital}
    energies = [PricedEnergy(_price(counts, profile, placement, latencies)) for profile in chip_profiles]
    if target.name == "loihi2" and profiles is None and own:
        energies.append(PricedEnergy(on_chip.extrapolated(counts, placement, latencies, TURNS)))
    stepwise = every_step(counts)
    loops = any(loop for _, loop in components(counted))  # then one evaluation a sample computes something else
    dense = ((EACH, stepwise),) if loops else ((ONCE, counts), (EACH, stepwise))
    for profile in dense_profiles.values() if any(item.dense_macs for item in counts) else ():
        energies += [PricedEnergy(account(which, profile), often) for often, which in dense]
    break_evens: dict[str, tuple[BreakEven, ...]] = {}
    reason = ""
    try:
        for often, which in dense:
            break_evens[often] = tuple(
                break_even(which, profile, digital, placement=placement if on_chip.of_chip(profile, placement) else None)
                for profile in chip_profiles
            )
        found = standings(counts)
    except ValueError as error:  # nothing was sent, or there are no weights
        break_evens, reason, found = {}, str(error), ()
    return GraphAccount(
        graph=counted,
        activity=run.activity,
        counts=counts,
        zeros=zero_weights(graph, counted, run),
        placement=placement,
        placement_reason=why_not_placed,
        energies=tuple(energies),
        latencies=latencies,
        latency_reason=why_not_timed,
        break_evens=break_evens,
        break_even_reason=reason,
        standings=found,
        pools=pools,
        published=tuple(each for each in load_networks().values() if pools is not None and is_pooled(each.chip)),
    )


def _target(chip: str | Path | Chip | PooledChip | None, own: bool) -> Chip | PooledChip:
    if isinstance(chip, Chip | PooledChip):
        return chip
    name = ("loihi2" if own else "xylo_audio2") if chip is None else chip
    return load_pooled(name) if is_pooled(name) else load_chip(name)


def _placed(graph: SpikingGraph, run: CountedRun, chip: Chip, chips: int | None) -> tuple[Placement | None, str]:
    try:
        return place(measured_demands(graph, run), chip, chips), ""
    except DoesNotFit:
        raise
    except ValueError as error:  # a chip without a budget
        return None, str(error)


def _timed(
    graph: SpikingGraph, run: CountedRun, counts: Sequence[Counts], placement: Placement | None
) -> tuple[tuple[Latency, ...], str]:
    if placement is None:
        return (), "no placement"
    names = [name for name in list_rates() if load_rates(name).chip == placement.chip]
    if not names:
        return (), f"no rates of chip {placement.chip} are known"
    per_core = counts_per_core(graph, run, placement)
    try:
        return tuple(estimate(counts, placement, load_rates(name), core_counts=per_core) for name in names), ""
    except ValueError as error:  # a chip whose mesh is not known
        return (), str(error)


def _price(
    counts: Sequence[Counts], profile: Profile, placement: Placement | None, latencies: Sequence[Latency]
) -> EnergyReport:
    report = on_chip.price(counts, profile, placement, latencies, TURNS)
    if placement is None or on_chip.of_chip(profile, placement):
        return report
    said = f"assumes: events cost on {placement.chip} what this profile of another chip says; no static power"
    return replace(report, labels=(*report.labels, said))
