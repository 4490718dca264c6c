"""A description in real numbers to an integer graph of the chip's neurons.

Each layer becomes one population: of Lava's kinds where those do the same (lif, lif_reset: reset to zero at once, one decay
and threshold for all; read-outs, whose threshold is the highest there is), else lif_soft (reset by subtraction at once) or
lif_general (a delayed reset, none, decays or thresholds per neuron), which Lava does not have. Each projection delays by a
step, which the float network does not: a layer k deep sees step t at t + k, and messages that skip layers pass relays, a
neuron per source and step. A layer that is connected to itself hears its own spikes a step later, on the chip as in float.

With `steps` given populations start from rest when a sample's first step reaches them. A bias then sits in the neurons,
unless it must not act before that step (a loop would carry an early spike over it) or belongs to a current that decays:
then a second input, "one", sends 1 at each step, and the bias is a synapse from there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from torch import Tensor

from hardware.placement import DoesNotFit
from hardware.text import quoted
from neuro.conversion.integers import payload_bits
from neuro.conversion.spiking.arguments import checked_arguments
from neuro.conversion.spiking.checking import checked, generated_input, seen
from neuro.conversion.spiking.constants import without_constants
from neuro.conversion.spiking.description import INPUT, Description, Neurons, NotConvertible, Synapses
from neuro.conversion.spiking.fitting import VTH_LIMIT, Feed, Fit, Layer, Seen, fit, is_safe
from neuro.conversion.spiking.network import LifLayer, SpikingNetwork
from neuro.graph import Population, Projection, SpikingGraph

FEW_LEVELS, TOO_FEW_LEVELS = 32, 8  # of 127, of a layer's largest weights: warned of, refused
FEW_WINNERS = 0.9  # share of calibration samples that keep their winner, below which it is warned of
MOST_SUMMED = 127  # weight of a spike in a layer of sums
SPARSE = 0.5  # share of weights that are not 0 below which a matrix is stored as a sparse one
CLIPPED = 1e-3  # share of updates with a clipped v above which the loss is warned of
GOOD_CLASSES, GOOD_SPIKES = 0.99, 0.995  # agreement on the calibration with which pieces="auto" stays with one
WORTH_TWO = 0.75  # share of one synapse's losses below which two are taken
_RESETS = {"zero": 0, "subtract": 1, "none": 2}


class PrecisionWarning(UserWarning):
    """A conversion that keeps few weight levels, or whose calibration clipped v or wrapped a sum."""


class WinnersWarning(PrecisionWarning):
    """A conversion after which another output wins in more than a tenth of the calibration's samples."""


@dataclass(frozen=True)
class Settings:
    """How to convert; the arguments of `convert_spiking`."""

    steps: int | None
    input_scale: float
    input_range: tuple[int, int]
    headroom_bits: float
    pieces: int


def convert_spiking(
    description: Description,
    *,
    steps: int | None,
    calibration: Tensor | None = None,
    input_scale: float = 1.0,
    input_range: tuple[int, int] = (0, 1),
    headroom_bits: float = 0.5,
    pieces: int | str = 1,
) -> SpikingNetwork:
    """Convert a spiking network in real numbers.

    Args:
        description: of the network.
        steps: length of a sample: populations start from rest at each sample, and samples of a network without loops may be
            streamed. None: they never restart; then biases are refused, as they would act before the first message arrives.
        calibration: inputs (B, T, F) in their own units, at least as strong as those to come. The ranges that no bound over
            all inputs keeps small enough for 8-bit weights are taken from there, and the integers are compared with the
            float network on it (`SpikingNetwork.check`). None: where that is needed, inputs at random within the range.
        input_scale: float value of one unit of an input message: 1 for spikes, 1/16 for currents of 0..16 sixteenths.
        input_range: lowest and highest input message; (0, 1) are binary spikes.
        headroom_bits: bits to leave free above the largest v.
        pieces: synapses per weight of a matrix: 1; 2, a coarse and a fine one, which doubles the synapses and their
            operations; "auto": two where one loses classes or spikes on the calibration and two lose fewer.

    Returns:
        SpikingNetwork.

    Raises:
        NotConvertible: an argument out of its range, a bias without `steps`, or ranges that fit no exponent; names the
            layer and the remedy.

    Warns:
        PrecisionWarning: the largest weights of a layer keep fewer than 32 of 127 levels (fewer than 8 are refused), or the
            calibration clipped v in more than a thousandth of the updates, or wrapped a sum.
        WinnersWarning: fewer than 90 % of the calibration's samples keep their winner.
    """
    low, high = checked_arguments(description, steps, input_scale, input_range, headroom_bits, pieces)
    description = without_constants(description)
    settings = Settings(steps, float(input_scale), (low, high), headroom_bits, 1 if pieces == "auto" else int(pieces))
    builder = _Builder(description, settings)
    given = calibration is not None
    endless = [name for name, layer in builder.layers.items() if steps is None and np.any(layer.dv == 0)]
    if endless and not given:
        raise NotConvertible(
            f"{endless[0]}: v never decays and steps is None, so nothing bounds it; give steps or a calibration, or train"
            " beta < 1"
        )
    if not given and (pieces != 1 or not all(is_safe(layer, headroom_bits) for layer in builder.layers.values())):
        calibration = generated_input(description, steps, settings.input_scale, settings.input_range)
    if calibration is None:
        return builder.network({})
    if isinstance(calibration, Tensor) and not len(calibration):
        raise NotConvertible("the calibration holds no sample; give inputs like those to come, (samples, steps, inputs)")
    ranges = seen(description, calibration)

    def made(settings: Settings) -> SpikingNetwork:
        network = _Builder(description, settings).network(ranges)
        return replace(network, check=checked(network, description, calibration, generated=not given))

    network = made(settings)
    if pieces == "auto":
        network = _better(network, lambda: made(replace(settings, pieces=2)))
    _warn(network)
    return network


def _better(one: SpikingNetwork, make_two: Callable[[], SpikingNetwork]) -> SpikingNetwork:
    classes, spikes = _lost(one)
    if classes <= 1 - GOOD_CLASSES and spikes <= 1 - GOOD_SPIKES:
        return replace(one, notes=(*one.notes, "pieces=auto: one synapse per weight is enough"))
    two = make_two()
    chosen = two if sum(_lost(two)) < WORTH_TWO * (classes + spikes) else one
    prices = [f"{network.synapses:,} synapses, {_cores(network)}" for network in (one, two)]
    said = (
        f"pieces=auto: {'two synapses' if chosen is two else 'one synapse'} per weight. With one ({prices[0]}):"
        f" {one.check}. With two ({prices[1]}): {two.check}"
    )
    return replace(chosen, notes=(*chosen.notes, said))


def _cores(network: SpikingNetwork) -> str:
    try:
        count = network.cores()
    except DoesNotFit as failure:
        return f"on no Loihi 2: {failure}"
    return f"{count} core{'s' * (count != 1)} of a Loihi 2"


def _lost(network: SpikingNetwork) -> tuple[float, float]:
    """Shares of classes, and of the worst layer's spikes, that differ from the float network's."""
    check = network.check
    assert check is not None
    return 1 - check.class_agreement, 1 - min(check.spike_agreement.values(), default=1.0)


def _warn(network: SpikingNetwork) -> None:
    found = []
    for layer in network.layers:
        most = max(layer.levels.values(), default=127)
        if layer.synapses and most < FEW_LEVELS:
            found.append(f"{layer.name}: its largest weight keeps {most} of 127 levels")
    check = network.check
    if check is not None and check.clips > CLIPPED * check.updates:
        found.append(f"v was clipped {check.clips:,} times in {check.updates:,} updates of the calibration, {check.lost}")
    if check is not None and check.wraps:
        found.append(f"a sum or current left its register {check.wraps:,} times in the calibration")
    if found:
        warnings.warn(
            f"the conversion loses much: {'; '.join(found)}. Train with smaller weights or fewer steps of inhibition, give"
            " a calibration like the inputs to come, or pieces=2",
            PrecisionWarning,
            stacklevel=3,
        )
    if check is not None and check.class_agreement < FEW_WINNERS:
        kept = f"{100 * check.class_agreement:.0f} % of the calibration's samples keep their winner"
        remedy = "give pieces=2 or 'auto' where weights are a matrix, or train with 8-bit weights in mind"
        warnings.warn(f"the conversion loses winners: {kept}; {remedy}", WinnersWarning, stacklevel=3)


class _Builder:
    """Layers in units of their thresholds first, then the graph."""

    def __init__(self, description: Description, settings: Settings) -> None:
        self._description, self._settings = description, settings
        self._depths = description.depths()
        names = set(description.layer_names)
        self._one = next(name for name in ("one", "constant_one", "constant_one_of_the_conversion") if name not in names)
        self._relays: dict[str, int] = {}  # source -> longest delay beyond the one step of a projection
        self.notes: list[str] = list(description.notes)
        self._lines = self._on_lines()
        kept = (description.layer(name) for name in list(self._depths)[1:])
        self.layers = {layer.name: self._layer(layer) for layer in kept if not layer.sums}

    def _on_lines(self) -> set[str]:
        """Layers whose bias comes by synapses from the constant input."""
        d = self._description
        loops = [self._depths[item.target] for item in d.synapses if item.recurrent]
        found = set()
        for layer in d.neurons:
            if layer.biased and self._settings.steps is None:
                raise NotConvertible(
                    f"{layer.name} has a bias, which acts before the first message arrives; convert with steps=T"
                )
            if np.any(layer.current_bias) and np.any(layer.alpha):
                found.add(layer.name)
            elif (
                layer.biased
                and d.incoming(layer.name)
                and max(loops, default=0) >= self._depths[layer.name]
                and self._early(layer, max(loops))
            ):
                if np.any(layer.alpha):
                    raise NotConvertible(
                        f"{layer.name}: its bias alone makes it spike before a sample's first step arrives, which the loop"
                        " behind it would hear. Move the bias into the synapses (current_bias)"
                    )
                found.add(layer.name)
        return found

    @staticmethod
    def _early(layer: Neurons, steps: int) -> bool:
        v = np.zeros(layer.size)
        for _ in range(steps):
            v = layer.beta * v + layer.bias + layer.current_bias
            if np.any(v > 0.98 * layer.threshold):
                return True
        return False

    def _layer(self, neurons: Neurons) -> Layer:
        incoming = self._description.incoming(neurons.name)
        gain, threshold, odd = _gain(neurons, any(item.conv is not None for item in incoming))
        feeds = tuple(self._feed(item, gain) for item in incoming if np.any(item.weight))
        bias = neurons.bias + neurons.current_bias
        if neurons.name in self._lines:
            by_line = neurons.current_bias + (0 if np.any(neurons.alpha) else neurons.bias)
            bias = neurons.bias + neurons.current_bias - by_line
            source = self._relayed(self._one, self._depths[neurons.name] - 1)
            feeds += (Feed(f"{neurons.name}_bias", source, (by_line * gain)[:, None], None, (0, 1), 0),)
        du = np.clip(np.rint(4096 * (1 - neurons.alpha)) - 1, 0, 4095).astype(np.int64)
        if np.any(neurons.alpha > 1 - 1 / 8192):
            self.notes.append(f"{neurons.name}: a current keeps 4095/4096 from step to step at the most, and alpha is 1")
        dv = np.minimum(4095, 4096 - np.rint(4096 * neurons.beta)).astype(np.int64)
        return Layer(
            neurons.name, feeds, bias * gain, du, dv, threshold, odd, neurons.reset, neurons.reset_delayed,
            self._settings.steps,
        )  # fmt: skip

    def _feed(self, item: Synapses, gain: np.ndarray) -> Feed:
        rows = gain[: len(item.weight)]  # of a kernel: gains repeat with the channels, which are the last axis
        weight = item.weight * rows.reshape(-1, *[1] * (item.weight.ndim - 1))
        if item.source == INPUT:
            weight = weight * self._settings.input_scale
        edges, bits = self._messages(item.source)
        gap = 0 if item.recurrent else self._depths[item.target] - self._depths[item.source] - 1
        return Feed(item.name, self._relayed(item.source, gap), weight, item.conv, edges, bits)

    def _messages(self, source: str) -> tuple[tuple[int, int], int]:
        """Lowest and highest message of a source, and the width of its payload, 0 for spikes."""
        edges = self._settings.input_range if source == INPUT else (0, 1)
        if source != INPUT and source in self._description.layer_names and self._description.layer(source).sums:
            edges = (0, sum(_most(item) for item in self._description.incoming(source)))
        return edges, 0 if edges[0] >= 0 and edges[1] <= 1 else payload_bits(max(abs(edges[0]), abs(edges[1])))

    def _relayed(self, source: str, gap: int) -> str:
        self._relays[source] = max(self._relays.get(source, 0), gap)
        return _relay(source, gap)

    def network(self, ranges: dict[str, Seen]) -> SpikingNetwork:
        s, d = self._settings, self._description
        populations = [Population(INPUT, "input", math.prod(d.input_shape))]
        projections: list[Projection] = []
        if self._lines:
            populations.append(Population(self._one, "input", 1))
            self.notes.append(
                f"input {quoted(self._one)} is 1 at each step: biases of {', '.join(sorted(self._lines))} come from there "
                "by a synapse per neuron"
            )
        records = []
        for name, layer in self.layers.items():
            seen_of = ranges.get(name)
            if seen_of is not None:
                gain = _gain(d.layer(name), any(item.conv is not None for item in d.incoming(name)))[0]
                seen_of = Seen(seen_of.sums * gain, seen_of.currents * gain, seen_of.potentials * gain)
            found = fit(layer, s.headroom_bits, seen_of, s.pieces)
            population = self._population(layer, found)
            populations.append(population)
            made = list(_projections(layer, found))
            projections += made
            records.append(_record(layer, found, population.kind, made))
        for pool in (layer for layer in d.neurons if layer.sums):
            populations.append(Population(pool.name, "graded", pool.size, {"vth": 0}))
            projections += [self._summing(item) for item in d.incoming(pool.name)]
            self.notes.append(
                f"{pool.name}: {pool.size:,} neurons that send sums of up to {self._messages(pool.name)[0][1]} spikes as"
                " graded messages, a step later; Loihi 1 has none"
            )
        for source, gap in self._relays.items():
            populations, projections = self._with_relays(source, gap, populations, projections)
        self._describe(populations)
        readouts = tuple(name for name in d.outputs if d.layer(name).is_readout)
        meta = {
            "route": "lif",
            "steps": s.steps,
            "input_scale": s.input_scale,
            "input_range": list(s.input_range),
            "layers": [asdict(record) for record in records],
            "depths": {name: depth for name, depth in self._depths.items() if name != INPUT},
            "readouts": list(readouts),
        }
        graph = SpikingGraph(tuple(populations), tuple(projections), d.outputs, meta)
        depths = {name: depth for name, depth in self._depths.items() if name != INPUT}
        return SpikingNetwork(
            graph, tuple(records), s.steps, s.input_scale, s.input_range, depths, readouts, tuple(self.notes), None, d
        )

    def _population(self, layer: Layer, found: Fit) -> Population:
        neurons = self._description.layer(layer.name)
        uniform = all(len(set(part.tolist())) == 1 for part in (layer.du, layer.dv, _thresholds(layer)))
        kind = "lif_general"
        if uniform and not layer.delayed:
            if neurons.is_readout or layer.reset == "zero":
                kind = "lif" if self._settings.steps is None else "lif_reset"
            elif layer.reset == "subtract":
                kind = "lif_soft"
        vth: Any = (
            np.full(layer.size, VTH_LIMIT) if layer.threshold is None else np.rint(layer.threshold * found.units / 64)
        )
        params: dict[str, Any] = {"du": layer.du, "dv": layer.dv, "vth": vth.astype(np.int64)}
        params = {key: int(value[0]) if len(set(value.tolist())) == 1 else value for key, value in params.items()}
        params |= {"bias_mant": found.mantissa, "bias_exp": found.exponent}
        if kind == "lif_general":
            params |= {"reset": _RESETS[layer.reset], "reset_delay": int(layer.delayed)}
        if self._settings.steps is not None:
            offset = (self._depths[layer.name] + 1) % self._settings.steps
            params |= {"reset_interval": self._settings.steps, "reset_offset": offset}
        return Population(layer.name, kind, layer.size, params)

    def _summing(self, item: Synapses) -> Projection:
        """Synapses to a layer of sums: whole weights as they are."""
        gap = self._depths[item.target] - self._depths[item.source] - 1
        if self._messages(item.source)[1]:
            raise NotConvertible(
                f"{item.target}: a layer of sums takes spikes; {quoted(item.source)} sends graded messages"
            )
        source, weight = self._relayed(item.source, gap), item.weight.astype(np.int64)
        if item.conv is not None:
            return Projection(item.name, source, item.target, "a_in", weight, 0, kind="conv", conv=item.conv)
        return Projection(item.name, source, item.target, "a_in", 2 * weight, -1, kind="sparse")

    def _with_relays(
        self, source: str, gap: int, populations: list[Population], projections: list[Projection]
    ) -> tuple[list[Population], list[Projection]]:
        size = next(p.size for p in populations if p.name == source)
        _, bits = self._messages(source)
        binary = bits == 0
        for step in range(1, gap + 1):
            before, here = _relay(source, step - 1), _relay(source, step)
            if binary:
                populations.append(Population(here, "lif", size, {"du": 4095, "dv": 4095, "vth": 1}))
            else:
                populations.append(Population(here, "graded", size, {"vth": 0}))
            weight = 2 * np.eye(size, dtype=np.int64)
            projections.append(Projection(here, before, here, "a_in", weight, -1 + binary, 8, "mixed", bits, "sparse"))
        if gap:
            self.notes.append(
                f"{source}: its messages skip layers and pass a relay, {size} neuron{'s' * (size > 1)}, at each of {gap}"
                f" step{'s' * (gap > 1)}"
            )
        return populations, projections

    def _describe(self, populations: Iterable[Population]) -> None:
        for population in populations:
            if population.kind in ("lif_soft", "lif_general"):
                self.notes.append(
                    f"{population.name}: {population.kind}, a program of the chip's neuron; Lava 0.10 does not have it"
                )


def _most(item: Synapses) -> int:
    """Largest sum of spikes through synapses to a layer of sums; NotConvertible where they are no small whole numbers."""
    if item.weight.min() < 0 or item.weight.max() > MOST_SUMMED or np.any(item.weight != np.rint(item.weight)):
        raise NotConvertible(
            f"{item.target}: a layer of sums has whole weights 0..{MOST_SUMMED}; those of {quoted(item.name)} reach over"
            f" {item.weight.min():g}..{item.weight.max():g}. Scale behind it"
        )
    return int(item.weight.reshape(len(item.weight), -1).sum(axis=1).max())


def _relay(source: str, step: int) -> str:
    return f"{source}_relay{step}" if step else source


def _gain(neurons: Neurons, convolved: bool) -> tuple[np.ndarray, np.ndarray | None, int]:
    """Factor of each neuron's weights (N,), its threshold after it (None: a read-out), and the odd part all share."""
    if neurons.is_readout:
        return np.ones(neurons.size), None, 1
    threshold = neurons.threshold
    if len(set(threshold.tolist())) == 1:
        numerator = Fraction(float(threshold[0])).numerator
        odd = numerator // (numerator & -numerator)
        return 1 / threshold, np.ones(neurons.size), odd if odd < 2**11 else 1
    if convolved and np.any(threshold != np.resize(threshold[: neurons.shape[-1]], neurons.size)):
        return np.ones(neurons.size), threshold, 1  # a kernel is shared by neurons of different thresholds
    return 1 / threshold, np.ones(neurons.size), 1


def _thresholds(layer: Layer) -> np.ndarray:
    return np.ones(1) if layer.threshold is None else layer.threshold


def _projections(layer: Layer, found: Fit) -> Iterable[Projection]:
    for feed, parts in zip(layer.feeds, found.pieces, strict=True):
        for number, part in enumerate(parts):
            name = f"{feed.name}_fine" if number else feed.name
            kind = "conv" if feed.conv is not None else "dense"
            if feed.conv is None and 0 < np.count_nonzero(part.weight) < SPARSE * part.weight.size:
                kind = "sparse"
            yield Projection(
                name, feed.source, layer.name, "a_in", part.weight, part.weight_exp, 8, "mixed", feed.message_bits, kind,
                conv=feed.conv,
            )  # fmt: skip


def _record(layer: Layer, found: Fit, kind: str, projections: list[Projection]) -> LifLayer:
    first = projections[0] if projections else None
    largest = 0 if first is None else int(np.abs(first.weight).max())
    levels = {p.name: int(np.abs(p.weight).max()) // 2 for p in projections}
    most = max(levels.values(), default=127)
    if any(feed.largest for feed in layer.feeds) and most < TOO_FEW_LEVELS:
        raise NotConvertible(
            f"{layer.name}: its sums leave its largest weight {most} of 127 levels, which is another network."
            " Shrink its weights (weight decay), its inputs' range, the steps, or headroom_bits"
        )
    return LifLayer(
        layer.name, found.units, 0 if first is None else first.weight_exp, largest, int(layer.dv.max()),
        found.spare_bits_sum, found.spare_bits_v, int(layer.du.max()), kind, found.safe, levels,
        sum(len(p.synapse_ends()[0]) for p in projections),
    )  # fmt: skip
