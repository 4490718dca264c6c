"""From layers to a placement: split, count output axons, share cores, choose chips, and start again where axons run out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from hardware.chips.budget import Budget
from hardware.chips.chip import Chip
from hardware.placement.cost import Part, TooWide, mapped_by_position, over, resources, synops
from hardware.placement.demand import Connection, Convolution, LayerDemand
from hardware.placement.report import Core, DoesNotFit, Flow, LayerPlacement, Limit, Placement, plain_name
from hardware.placement.split import CannotSplit, split_layer
from hardware.placement.traffic import Edges, assign, crossing, edges

if TYPE_CHECKING:
    import numpy as np

FAR_ENTRIES = 2
"""Output-axon entries of one neuron for a core on another chip; 1 on the same chip (NxTF, discrete axons)."""

MOST_ROUNDS = 10
"""Rounds of smaller parts for the sake of output axons: smaller parts mean more receivers, so it can go on for ever."""
MOST_GROWTH = 3
"""By what factor those rounds may raise the number of parts."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How to place: as the arguments of `place` of the same names."""

    split: str
    encoding: str | None
    share: bool


def lay_out(demands: Sequence[LayerDemand], chip: Chip, budget: Budget, chips: int | None, options: Options) -> Placement:
    """The placement of checked layers; DoesNotFit with the binding limit, and with remedies only where they are local."""
    import numpy as np

    layers = {demand.name: demand for demand in _in_order(demands)}
    positions = mapped_by_position(layers)

    def need(part: Part, rule: Budget = budget) -> dict[str, int]:
        return resources(layers[part.layer], part, rule, options.encoding, by_position=part.layer in positions)

    caps: dict[str, int] = {}
    alone: set[str] = set()
    most_parts = 0
    parts: list[Part] = []
    entries: np.ndarray = np.zeros(0, dtype=np.int64)
    distant: np.ndarray = np.zeros(0)
    for _ in range(MOST_ROUNDS):
        parts_before, parts = parts, _split(layers, chip, budget, options, caps, positions)
        most_parts = most_parts or MOST_GROWTH * len(parts)
        if len(parts) > most_parts:
            parts = parts_before
            break
        between = edges(parts, layers)
        taken = [need(part) for part in parts]
        if "axon_out" in budget.limits:
            entries = _entries(parts, between, np.zeros(len(between.source), dtype=bool))
            if _cap(parts, [[i] for i in range(len(parts))], entries, budget, layers, caps, alone, "axon_out"):
                continue
            for own, count in zip(taken, entries, strict=True):
                own["axon_out"] = int(count)
        groups = _share(parts, taken, budget, alone) if options.share else [[i] for i in range(len(parts))]
        core_of = np.zeros(len(parts), dtype=np.int64)
        for core, members in enumerate(groups):
            core_of[members] = core
        needed = math.ceil(len(groups) / chip.cores)
        if chips is not None and needed > chips:
            limit = Limit("cores", len(groups), chips * chip.cores)
            raise DoesNotFit(f"the network on {chips} chip{'s' * (chips > 1)}", limit, ())
        chip_of = assign(len(groups), chip.cores, between, core_of)
        if "axon_out" in budget.limits:
            far = chip_of[core_of[between.source]] != chip_of[core_of[between.target]]
            entries = _entries(parts, between, far)
            distant = np.bincount(between.source[far], weights=FAR_ENTRIES * between.neurons[far], minlength=len(parts))
            if _cap(parts, groups, entries, budget, layers, caps, alone, "axon_out") or (
                "axon_out_far" in budget.limits
                and _cap(parts, groups, distant.astype(np.int64), budget, layers, caps, alone, "axon_out_far")
            ):
                continue
            for own, count, remote in zip(taken, entries, distant, strict=True):
                own["axon_out"] = int(count)
                if "axon_out_far" in budget.limits:
                    own["axon_out_far"] = int(remote)
        return _report(chip, budget, chips, options, layers, parts, need, taken, groups, chip_of, core_of, between)
    worst, resource, used = _most_axons(parts, entries, distant, budget)
    limit = Limit(resource, used, budget.limits[resource])
    what = f"{plain_name(worst)}, cut into ever smaller parts,"
    raise DoesNotFit(what, limit, (f"fewer receivers of {plain_name(worst)}",))


def _most_axons(parts: Sequence[Part], entries: np.ndarray, distant: np.ndarray, budget: Budget) -> tuple[str, str, int]:
    """(layer, resource, used) that smaller parts did not bring under the limit."""
    near = int(entries.argmax())
    if entries[near] > budget.limits["axon_out"] or len(distant) != len(parts):
        return parts[near].layer, "axon_out", int(entries[near])
    far = int(distant.argmax())
    return parts[far].layer, "axon_out_far", int(distant[far])


def _split(
    layers: Mapping[str, LayerDemand],
    chip: Chip,
    budget: Budget,
    options: Options,
    caps: Mapping[str, int],
    positions: frozenset[str],
) -> list[Part]:
    parts: list[Part] = []
    for layer in layers.values():
        if not layer.on_chip:
            continue
        try:
            parts += split_layer(
                layer,
                budget,
                layers,
                graded=chip.graded,
                split=options.split,
                encoding=options.encoding,
                most_neurons=caps.get(layer.name),
                by_position=layer.name in positions,
            )
        except TooWide as failure:
            limit = Limit(failure.resource, failure.used, failure.limit)
            words = f"{failure.limit}-bit weights" if failure.resource == "weight_bits" else f"delays up to {failure.limit}"
            raise DoesNotFit(plain_name(layer.name), limit, (f"{words} in {plain_name(layer.name)}",)) from None
        except CannotSplit as failure:
            remedy = failure.remedy.replace("{name}", plain_name(layer.name))
            raise DoesNotFit(f"{plain_name(layer.name)}, {failure.where}", Limit(*failure.taken), (remedy,)) from None
    return parts


def _entries(parts: Sequence[Part], between: Edges, far: np.ndarray) -> np.ndarray:
    """Output-axon entries of every part; a neuron that no core listens to still takes one, to the host."""
    import numpy as np

    cost = between.neurons * np.where(far, FAR_ENTRIES, 1)
    found = np.bincount(between.source, weights=cost, minlength=len(parts)).astype(np.int64)
    for number, part in enumerate(parts):
        if found[number] == 0:
            found[number] = part.neurons
    return found


def _cap(
    parts: Sequence[Part],
    groups: Sequence[Sequence[int]],
    entries: np.ndarray,
    budget: Budget,
    layers: Mapping[str, LayerDemand],
    caps: dict[str, int],
    alone: set[str],
    resource: str,
) -> bool:
    """Ask for smaller parts where a core has too many output axons; True if something was asked for."""
    limit = budget.limits[resource]
    asked = False
    for members in groups:
        used = sum(int(entries[i]) for i in members)
        if used <= limit:
            continue
        if len(members) > 1:
            alone.update(parts[i].layer for i in members)
            asked = True
            continue
        part = parts[members[0]]
        cap = math.floor(part.neurons * limit / used)
        if cap < 1 or layers[part.layer].cores is not None:
            remedy = f"fewer receivers of {plain_name(part.layer)}"
            raise DoesNotFit(plain_name(part.layer), Limit(resource, used, limit), (remedy,))
        caps[part.layer] = min(cap, caps.get(part.layer, part.neurons), part.neurons - 1)
        asked = True
    return asked


def _share(parts: Sequence[Part], taken: Sequence[Mapping[str, int]], budget: Budget, alone: set[str]) -> list[list[int]]:
    """First core with room takes the part; largest parts first, then cores back in the order of their first part."""
    groups: list[list[int]] = []
    sums: list[dict[str, int]] = []
    size = [max(own[name] / budget.limits[name] for name in own) for own in taken]
    for number in sorted(range(len(parts)), key=lambda i: (-size[i], i)):
        own = taken[number]
        if parts[number].layer not in alone:
            for members, total in zip(groups, sums, strict=True):
                if parts[members[0]].layer in alone:
                    continue
                together = _together(total, own)
                if over(together, budget) is None:
                    members.append(number)
                    total.update(together)
                    break
            else:
                groups.append([number])
                sums.append(dict(own))
        else:
            groups.append([number])
            sums.append(dict(own))
    return sorted((sorted(members) for members in groups), key=lambda members: members[0])


def _together(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    return {
        name: max(first[name], second[name]) if name == "words_per_axon" else first[name] + second[name] for name in first
    }


def _report(
    chip: Chip,
    budget: Budget,
    chips: int | None,
    options: Options,
    layers: Mapping[str, LayerDemand],
    parts: Sequence[Part],
    need: Callable[..., dict[str, int]],
    taken: Sequence[Mapping[str, int]],
    groups: Sequence[Sequence[int]],
    chip_of: np.ndarray,
    core_of: np.ndarray,
    between: Edges,
) -> Placement:
    import numpy as np

    others = [other for other in chip.budgets.values() if other.rule != budget.rule]
    slots: dict[int, int] = {}
    cores = []
    for number, members in enumerate(groups):
        total = dict(taken[members[0]])
        for i in members[1:]:
            total = _together(total, taken[i])
        place_on = int(chip_of[number])
        slots[place_on] = slots.get(place_on, -1) + 1
        held = tuple(parts[i] for i in members)
        work: dict[str, float] = {}
        for part in held:
            work[part.layer] = work.get(part.layer, 0.0) + synops(layers[part.layer], part, layers)
        cores.append(
            Core(
                number=number,
                chip=place_on,
                slot=slots[place_on],
                parts=held,
                used={name: Limit(name, total[name], budget.limits[name]) for name in budget.limits if name in total},
                synops=math.fsum(work.values()),
                synops_of=work,
                other_words={other.name: sum(need(part, other)["synapse_words"] for part in held) for other in others},
            )
        )
    placed = []
    for layer in layers.values():
        if not layer.on_chip:
            continue
        mine = [number for number, core in enumerate(cores) if any(part.layer == layer.name for part in core.parts)]
        whole = Part(layer.name, tuple((0, size) for size in layer.box))  # type: ignore[arg-type]
        all_of_it = need(whole)
        worst = max(all_of_it, key=lambda name: all_of_it[name] / budget.limits[name])
        split = any(part.role == "sum" for part in parts if part.layer == layer.name)
        own = [synops(layer, part, layers) for part in parts if part.layer == layer.name]
        even = [
            work
            for part, work in zip((part for part in parts if part.layer == layer.name), own, strict=True)
            if part.role != "sum"
        ]
        placed.append(
            LayerPlacement(
                name=layer.name,
                neurons=layer.neurons,
                cores=tuple(mine),
                binding=Limit(worst, all_of_it[worst], budget.limits[worst]),
                synops=math.fsum(own),
                imbalance=max(even) * len(even) / math.fsum(even) if any(even) else 1.0,
                partial_sums=split,
                events=math.fsum(layers[c.source].mean_rate * c.inputs for c in layer.connections),
            )
        )
    core_pairs = core_of[between.source] != core_of[between.target]
    across = crossing(chip_of, between, core_of)
    return Placement(
        chip=chip.name,
        title=chip.title,
        budget=budget.name,
        budget_title=budget.title,
        chips=int(np.max(chip_of)) + 1,
        chips_available=chips,
        cores_per_chip=chip.cores,
        cores=tuple(cores),
        layers=tuple(placed),
        messages_between_cores=float(between.rate[core_pairs].sum()),
        messages_between_chips=across,
        messages_from_host=between.from_host,
        measured=all(layer.measured for layer in layers.values()),
        notes=_notes(budget, layers, parts, options),
        shapes={layer.name: layer.box for layer in layers.values() if layer.on_chip},
        flows=_flows(parts, core_of, between),
    )


def _flows(parts: Sequence[Part], core_of: np.ndarray, between: Edges) -> tuple[Flow, ...]:
    found: dict[tuple[int, int, str], float] = {}
    pairs = zip(between.source.tolist(), between.target.tolist(), between.rate.tolist(), strict=True)
    for source, target, rate in pairs:
        key = (int(core_of[source]), int(core_of[target]), parts[target].layer)
        found[key] = found.get(key, 0.0) + rate
    for target, rate in enumerate(between.host.tolist()):
        if rate:
            key = (-1, int(core_of[target]), parts[target].layer)
            found[key] = found.get(key, 0.0) + rate
    return tuple(Flow(*key, messages) for key, messages in found.items())


def _notes(budget: Budget, layers: Mapping[str, LayerDemand], parts: Sequence[Part], options: Options) -> tuple[str, ...]:
    notes = []
    if budget.inferred:
        notes.append(f"inferred from published compiler output, not stated by the maker: {', '.join(budget.inferred)}")
    connections = [c for layer in layers.values() for c in layer.connections]
    dense = [c for c in connections if isinstance(c, Connection) and "dense" in (c.encoding, options.encoding)]
    if budget.rule == "netx":
        if dense or (budget.encoding == "dense" and connections):
            notes.append("index-free synapses: no published compiler table shows them; a published model implies them")
        if any(isinstance(c, Convolution) for c in connections):
            notes.append("axon-mem is left out: it is not decoded (at most 731 words in the published rows)")
        if any(c.max_delay for c in connections):
            notes.append("the delay field is the one of Loihi 1: no Loihi 2 table with delays is published")
    if any(part.role == "sum" for part in parts):
        notes.append("partial sums travel as graded messages and arrive one step later; the graph must allow for that step")
    if not all(layer.measured for layer in layers.values()):
        notes.append("rates not measured: every neuron is taken to send at every step")
    return tuple(notes)


def _in_order(demands: Sequence[LayerDemand]) -> list[LayerDemand]:
    """Sources before targets where there is no loop, else as given."""
    left, done, found = list(demands), set[str](), list[LayerDemand]()
    while left:
        ready = next((d for d in left if all(c.source in done or c.source == d.name for c in d.connections)), left[0])
        left.remove(ready)
        done.add(ready.name)
        found.append(ready)
    return found
