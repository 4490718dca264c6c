"""Forms as the integers of Xylo: units per neuron, weight shifts per pool, thresholds, biases, and partners.

Every neuron has a unit of its own, S integers of v for 1 of the description: its weights, threshold and bias are multiplied
by it. Its registers bound S by what the calibration reached, and 8 bits of weights bound it by the shift, of which a chip
has one for all inputs, one for all recurrent synapses and one for all read-outs. For each pair of shifts the S of each
neuron is taken that rounds its weights least, weighted with how often their sources fire; the pair with the least
rounding in all is chosen. A current takes its input before it decays, so that weights are divided by what it keeps.

A partner holds a neuron to one spike a step: it sends 30 at every step, driven by its bias alone, and its alias adds
them to those of the neuron, which may add one of its own before the chip's 31 are full. What the neuron feeds hears those
30 from the partner too, with weights of the other sign. Partner and neuron are numbered one behind the other, so that the
two meet in the register at once.

A relay is a read-out that repeats the spikes of one hidden neuron, for outputs that have to be hidden or whose decays need
two currents: its current loses half at each step and v holds nothing else, so that a threshold of half a spike's weight is
met by a spike alone. Rounded up, what eight spikes in a row leave behind is still less.

Shape letters: N neurons, S sources, J currents, C units that are tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from neuro.conversion.spiking.description import INPUT, Description, NotConvertible
from neuro.conversion.spiking.xylo.forms import Form, bias_of, kept, overlaps
from neuro.conversion.spiking.xylo.refusals import matrix_of
from neuro.graph import Population, Projection, SpikingGraph
from neuro.graph.xylo import MOST_SPIKES, SHIFTS, STATE_HIGH, synapses

FILLED = MOST_SPIKES["xylo"] - 1  # spikes of a partner
PARTNER_VTH = 1000
WEIGHT_LIMIT = 127
TRIED = 2.0 ** (np.arange(61) / 4)  # units S that are tried
FEWEST_UNITS = 16  # of a threshold
REACH = 4  # integers around the second current's weight that are tried
RELAY_WEIGHT, RELAY_SHIFT = 126, 3  # so that 30 spikes of a partner stay within the register
ROUNDED = 0.5  # units that a step's roundings of decays are taken to lose


@dataclass(frozen=True, eq=False)
class Group:
    """Synapses of one source and one current of a layer, in v's unit of the description.

    Attributes:
        weight: float64 (N, S): what a spike adds to the current before it decays.
        rate: (S,), mean of the squared spikes of a step.
    """

    source: str
    second: bool
    weight: np.ndarray
    rate: np.ndarray


@dataclass(frozen=True, eq=False)
class Layer:
    """What the integers of a layer are made from.

    Attributes:
        pool: source -> "in", "rec" or "out" follows from kind. threshold: (N,), STATE_HIGH / S of a read-out of values.
        peak: largest magnitude of a register on the calibration, (N,).
        relay: whether it repeats the spikes of the layer before.
    """

    name: str
    kind: str
    form: Form
    groups: tuple[Group, ...]
    threshold: np.ndarray
    bias: np.ndarray
    peak: np.ndarray
    relay: bool = False

    @property
    def size(self) -> int:
        """N."""
        return len(self.threshold)


@dataclass(frozen=True, eq=False)
class Made:
    """A graph and where things are in it.

    Attributes:
        places: layer -> index of each of its neurons in its population.
        partnered: layer -> whether a neuron has a partner, bool (N,).
        units: layer -> S of each neuron. levels: layer -> largest |weight| of 127 per projection's pool.
        shifts: pool -> weight shift.
    """

    graph: SpikingGraph
    places: dict[str, np.ndarray]
    partnered: dict[str, np.ndarray]
    units: dict[str, np.ndarray]
    levels: dict[str, dict[str, int]]
    shifts: dict[str, int]


def pool_of(source: str, kind: str) -> str:
    """The pool of synapses from a layer or the input to neurons of a kind."""
    return "out" if kind == "xylo_out" else "in" if source == INPUT else "rec"


def groups_of(
    description: Description, name: str, form: Form, input_scale: float, rates: Mapping[str, np.ndarray]
) -> tuple[Group, ...]:
    """Synapses that reach a layer, the ones that its form adds included; weights are of a spike."""
    layer = description.layer(name)
    by_source: dict[str, np.ndarray] = {}
    for item in description.incoming(name):
        by_source[item.source] = by_source.get(item.source, 0) + matrix_of(item) * (
            input_scale if item.source == INPUT else 1
        )
    taken = np.where(np.isfinite(layer.threshold), layer.threshold, 0)
    if np.any(form.own) and name not in by_source:
        by_source[name] = np.zeros((layer.size, layer.size))
    found = []
    for source, weight in by_source.items():
        for j, (gain, own, dash) in enumerate(zip(form.gain, form.own, form.dash_syn, strict=True)):
            amplitude = weight * gain[:, None]
            if source == name:
                amplitude = amplitude + np.diag(own * taken)
            if np.any(amplitude):
                found.append(Group(source, j == 1, amplitude / kept(dash)[:, None], rates[source]))
    return tuple(found)


def _losses(layer: Layer, pool: str) -> np.ndarray:
    """Squared error of v's drive from the rounding of weights, (shifts, C, N); infinite where a weight has no room."""
    total = np.zeros((SHIFTS[1] + 1, len(TRIED), layer.size))
    for group in layer.groups:
        if pool_of(group.source, layer.kind) != pool:
            continue
        largest = np.abs(group.weight).max(axis=1)
        for c, units in enumerate(TRIED):
            scaled = group.weight * units
            for shift in range(SHIFTS[1] + 1):
                room = largest * units <= (WEIGHT_LIMIT + 0.49) * 2**shift
                if not room.any():
                    total[shift, c] = np.inf
                    continue
                part = scaled[room] / 2**shift
                error = ((np.rint(part) - part) ** 2) @ group.rate * (4.0**shift / units**2)
                total[shift, c, room] += error
                total[shift, c, ~room] = np.inf
    return total


def _chosen(layers: Iterable[Layer], losses: Mapping[str, dict[str, np.ndarray]], room: float) -> tuple[dict, dict]:
    """Shift of each pool and S of each neuron."""
    shifts: dict[str, int] = {}
    units: dict[str, np.ndarray] = {}
    for pools in (("in", "rec"), ("out",)):
        of_pool = [layer for layer in layers if (layer.kind == "xylo_out") == (pools == ("out",))]
        members = [layer for layer in of_pool if not layer.relay]
        if not members:
            shifts |= dict.fromkeys(pools, RELAY_SHIFT) if of_pool else {}
            continue
        best: tuple[float, tuple[int, ...], dict[str, np.ndarray]] | None = None
        kinds = 1 + (SHIFTS[1] if len(members) == len(of_pool) else RELAY_SHIFT)
        for first in range(kinds):
            for second in range(kinds if len(pools) == 2 else 1):
                sums, at = 0.0, {}
                for layer in members:
                    each = losses[layer.name][pools[0]][first]
                    if len(pools) == 2:
                        each = each + losses[layer.name]["rec"][second]
                    allowed = TRIED[:, None] <= room * STATE_HIGH / layer.peak[None]
                    each = np.where(allowed, each + (ROUNDED / TRIED[:, None]) ** 2, np.inf) / layer.threshold**2
                    place = each.argmin(axis=0)
                    sums += float(each[place, np.arange(layer.size)].sum())
                    at[layer.name] = TRIED[place]
                if np.isfinite(sums) and (best is None or sums < best[0]):
                    best = sums, (first, second), at
        if best is None:
            raise NotConvertible(
                f"{members[0].name}: no weight shift keeps its weights within 8 bits and its states within 16. Train with"
                " smaller weights, measured in thresholds"
            )
        shifts |= dict(zip(pools, best[1], strict=False))
        units |= best[2]
    return shifts, units


def added_by_rounding(form: Form) -> np.ndarray:
    """Units that rounding adds to v at each step on average, (N,), while its currents are not at rest.

    A decay by `x >> k` takes off less than its share where x is above 0, and more where it is below: half a unit on
    average, upwards both times. In a current that sums up to half of 2^k units, which v takes in at every step.
    """
    moving = np.where(form.gain == 0, 0.0, 2.0**form.dash_syn)
    return np.asarray(0.5 * moving.sum(axis=0) + 0.5)


def together(exact: np.ndarray, whole: np.ndarray, overlap: np.ndarray) -> np.ndarray:
    """Two currents' weights rounded so that what they do to v together is nearest to what was meant.

    Args:
        exact, whole: (2, N, S), and rounded each by itself. overlap: of the two kernels, (N, 2, 2).
    """
    best, least = whole, np.full(exact.shape[1:], np.inf)
    g11, g12, g22 = (overlap[:, i, j, None] for i, j in ((0, 0), (0, 1), (1, 1)))
    for step in range(-REACH, REACH + 1):
        second = np.clip(np.rint(exact[1]) + step, -WEIGHT_LIMIT, WEIGHT_LIMIT)
        first = np.clip(np.rint(exact[0] - g12 / g11 * (second - exact[1])), -WEIGHT_LIMIT, WEIGHT_LIMIT)
        d1, d2 = first - exact[0], second - exact[1]
        error = g11 * d1**2 + 2 * g12 * d1 * d2 + g22 * d2**2
        nearer = error < least - 1e-12
        best, least = np.where(nearer, np.stack([first, second]), best), np.where(nearer, error, least)
    return np.where((exact == 0).all(axis=0), 0.0, best)


class Fitter:
    """The integers of one choice of forms, for any room above the registers' peaks."""

    def __init__(self, description: Description, layers: Mapping[str, Layer], partnered: Mapping[str, np.ndarray]) -> None:
        self._description, self._layers, self._partnered = description, layers, partnered
        self._losses = {
            name: {pool: _losses(layer, pool) for pool in ("in", "rec", "out")} for name, layer in layers.items()
        }

    def made(self, room: float, drop: float, meta: dict) -> Made:
        """The graph in which registers' peaks on the calibration are `room` of what they hold.

        `drop`: share of what rounding adds to v at each step (`added_by_rounding`) that the bias takes off.

        Raises NotConvertible where no units fit.
        """
        shifts, units = _chosen(list(self._layers.values()), self._losses, room)
        for layer in self._layers.values():
            if layer.relay:  # a threshold is half a spike's weight
                units[layer.name] = np.full(layer.size, RELAY_WEIGHT // 2 << shifts["out"])
        layers, places = self._layers, self._places()
        populations = {INPUT: Population(INPUT, "input", int(np.prod(self._description.input_shape)))}
        for name, layer in layers.items():
            few = np.rint(layer.threshold * units[name]) < FEWEST_UNITS
            if few.any() and not self._description.layer(name).is_readout:
                raise NotConvertible(
                    f"{name}: neuron {int(few.argmax())} keeps fewer than {FEWEST_UNITS} units per threshold, because its"
                    f" registers reach {float((layer.peak / layer.threshold)[few][0]):.3g} thresholds. Train with smaller"
                    " weights, or less inhibition"
                )
            populations[name] = self._population(layer, units[name], places[name], drop)
        projections: list[Projection] = []
        levels: dict[str, dict[str, int]] = {name: {} for name in layers}
        for name, layer in layers.items():
            for source_name in dict.fromkeys(group.source for group in layer.groups):
                pool = pool_of(source_name, layer.kind)
                parts = self._rounded(layer, source_name, units[name] / 2.0 ** shifts[pool])
                levels[name][pool] = max(levels[name].get(pool, 0), int(np.abs(parts).max()))
                source, target = populations[source_name], populations[name]
                for second, weight in enumerate(parts):
                    if not weight.any():
                        continue
                    whole = self._spread(weight, source_name, source.size, target.size, places, name)
                    label = f"{source_name}_to_{name}" + "_second" * second
                    projections.append(synapses(label, source, target, whole, shifts[pool], bool(second)))
        graph = SpikingGraph(tuple(populations.values()), tuple(projections), self._description.outputs, meta)
        return Made(graph, places, dict(self._partnered), units, levels, shifts)

    @staticmethod
    def _rounded(layer: Layer, source: str, units: np.ndarray) -> np.ndarray:
        """Weights from one source to a layer in integers, int64 (J, N, S)."""
        exact = np.zeros((len(layer.form.gain), layer.size, 0))
        for group in layer.groups:
            if group.source == source:
                exact = np.zeros((*exact.shape[:2], group.weight.shape[1])) if not exact.size else exact
                exact[int(group.second)] = group.weight * units[:, None]
        whole = np.clip(np.rint(exact), -WEIGHT_LIMIT, WEIGHT_LIMIT)
        if len(exact) == 2:
            whole = together(exact, whole, overlaps(layer.form))
        return whole.astype(np.int64)

    def _places(self) -> dict[str, np.ndarray]:
        return {name: np.arange(len(flags)) + np.cumsum(flags) for name, flags in self._partnered.items()}

    def _spread(
        self, weight: np.ndarray, source: str, sources: int, targets: int, places: Mapping[str, np.ndarray], name: str
    ) -> np.ndarray:
        """Weights at the neurons' places, and of the other sign at those of their sources' partners."""
        whole = np.zeros((targets, sources), dtype=np.int64)
        columns = np.arange(weight.shape[1]) if source == INPUT else places[source]
        whole[np.ix_(places[name], columns)] = weight
        if source != INPUT:
            flags = self._partnered[source]
            whole[np.ix_(places[name], columns[flags] - 1)] = -weight[:, flags]
        return whole

    def _population(self, layer: Layer, units: np.ndarray, places: np.ndarray, drop: float) -> Population:
        flags = self._partnered[layer.name]
        size = layer.size + int(flags.sum())
        partners = places[flags] - 1
        readout = self._description.layer(layer.name).is_readout
        vth = np.full(layer.size, STATE_HIGH) if readout else np.clip(np.rint(layer.threshold * units), 1, STATE_HIGH)
        added = 0.0 if layer.relay else drop * added_by_rounding(layer.form)
        bias = np.clip(np.rint(layer.bias * units - added), -STATE_HIGH - 1, STATE_HIGH)

        def whole(value: np.ndarray, fill: int) -> np.ndarray:
            found = np.full(size, fill, dtype=np.int64)
            found[places] = value
            return found

        form = layer.form
        params: dict[str, np.ndarray] = {
            "dash_mem": whole(form.dash_mem, 1),
            "dash_syn": whole(form.dash_syn[0], 1),
            "vth": whole(vth, PARTNER_VTH),
            "bias": whole(bias, FILLED * PARTNER_VTH),
        }
        if layer.kind == "xylo":
            if len(form.dash_syn) == 2:
                params["dash_syn2"] = whole(form.dash_syn[1], 1)
            if flags.any():
                alias = np.full(size, -1, dtype=np.int64)
                alias[partners] = places[flags]
                params["alias"] = alias
        return Population(layer.name, layer.kind, size, params)


def layers_of(
    description: Description,
    forms: Mapping[str, Form],
    outputs: Iterable[str],
    input_scale: float,
    rates: Mapping[str, np.ndarray],
    currents: Mapping[str, np.ndarray],
    peaks: Mapping[str, np.ndarray],
    partnered: Mapping[str, np.ndarray],
    relays: Iterable[str],
) -> dict[str, Layer]:
    """What integers are made from: weights as their registers take them, and what the registers reached."""
    found = {}
    for name in list(description.depths())[1:]:
        layer, form = description.layer(name), forms[name]
        groups = groups_of(description, name, form, input_scale, rates)
        reach = np.maximum(peaks[name], currents[name].max(axis=0))
        for group in groups:
            if group.source != INPUT and partnered[group.source].any():
                pairs = np.abs(group.weight[:, partnered[group.source]]).max(axis=1)
                reach = np.maximum(reach, currents[name].max(axis=0) + FILLED * pairs)
        threshold = np.array(layer.threshold)
        if layer.is_readout:
            threshold = np.maximum(reach, 1e-9)
        peak = np.maximum(np.maximum(reach, threshold), np.abs(bias_of(layer, form)))
        kind = "xylo_out" if name in outputs else "xylo"
        found[name] = Layer(name, kind, form, groups, threshold, bias_of(layer, form), peak, name in relays)
    return found
