"""What a part of a layer takes from a core: words of synaptic memory by the published rules, and every other resource.

A part is a box of a layer's neurons, and either all that arrives at them or a range of the inputs (a partial sum).
Sums over connections are exact integers; synaptic operations use the sources' rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hardware.chips.budget import RESOURCES, Budget
from hardware.placement.demand import Connection, Convolution, LayerDemand
from hardware.text import quoted

if TYPE_CHECKING:
    import numpy as np

PREFIX_BITS = 10
"""Format number (4) and length (6) before the synapses of a block or entry."""
WORD_BITS = 64
SHARED_AXON_NEURONS = 2048
"""A convolution's slice takes a second input axon above so many neurons (published compiler output)."""

Span = tuple[int, int]
Box = tuple[Span, Span, Span]


@dataclass(frozen=True)
class Part:
    """A box of one layer's neurons on one core.

    Attributes:
        layer: name.
        box: (W, H, C) ranges, ends excluded.
        role: ``"whole"`` (neurons with all their inputs), ``"partial"`` (sums over a range of the inputs, sent on as
            graded messages), ``"sum"`` (neurons that add up partial sums).
        inputs: of a partial part: for each connection the range of its inputs (convolution: input channels).
        parts: of a sum: how many partial parts send to it.
    """

    layer: str
    box: Box
    role: str = "whole"
    inputs: tuple[Span, ...] | None = None
    parts: int = 0

    @property
    def neurons(self) -> int:
        """Neurons in the box."""
        return math.prod(high - low for low, high in self.box)

    def indices(self, shape: tuple[int, int, int]) -> np.ndarray:
        """Their numbers in the layer, ascending, int64 (neurons,)."""
        import numpy as np

        (w0, w1), (h0, h1), (c0, c1) = self.box
        w, h, c = np.arange(w0, w1), np.arange(h0, h1), np.arange(c0, c1)
        return (((w[:, None] * shape[1]) + h)[:, :, None] * shape[2] + c).reshape(-1)


def axon_words(budget: Budget, synapses: int, bits: int, encoding: str, places: int) -> int:
    """64-bit words behind one input axon.

    Args:
        budget: the rule and its fields.
        synapses: how many synapses the axon has on this core.
        bits: per synapse: weight, delay and tag.
        encoding: ``"dense"``, ``"sparse"``, or ``"shared"`` (a convolution's kernel position).
        places: neurons that an index must tell apart.
    """
    if synapses == 0:
        return 0
    index = budget.index_field(places) if encoding == "sparse" else 0
    if budget.rule == "netx":
        return math.ceil((synapses * (bits + index) + PREFIX_BITS) / WORD_BITS)
    size = budget.entry_synapses or synapses
    full, rest = divmod(synapses, size)
    if budget.rule == "nengo":
        words = full * math.ceil((size * (bits + index) + PREFIX_BITS) / WORD_BITS)
        return words + (math.ceil((rest * (bits + index) + PREFIX_BITS) / WORD_BITS) if rest else 0)
    entries = full + (rest > 0)
    # A dense entry names in its prefix where it begins; the first begins at 0.
    offset = 0 if encoding == "sparse" else budget.index_field(1 + (entries - 1) * size)
    total = synapses * (bits + index) + entries * (PREFIX_BITS + offset)
    remainder = total % WORD_BITS
    return math.ceil(total / WORD_BITS) + (remainder == 0 or remainder >= 59)


def weight_width(budget: Budget, layer: LayerDemand, connection: Connection | Convolution) -> int:
    """The stored width of a connection's weights, bits.

    Raises:
        TooWide: no weight field is wide enough, or a delay is too long.
    """
    width = budget.weight_field(connection.weight_bits)
    if width is None:
        raise TooWide(layer.name, "weight_bits", connection.weight_bits, budget.weight_fields[-1])
    if connection.max_delay > budget.max_delay:
        raise TooWide(layer.name, "max_delay", connection.max_delay, budget.max_delay)
    return width


class TooWide(ValueError):
    """A weight or delay that no synapse of this chip holds, wherever it is put."""

    def __init__(self, layer: str, resource: str, used: int, limit: int) -> None:
        super().__init__(f"layer {quoted(layer)}: {resource} is {used}, a synapse holds at most {limit}")
        self.layer, self.resource, self.used, self.limit = layer, resource, used, limit


def _bits(budget: Budget, layer: LayerDemand, connection: Connection | Convolution) -> int:
    delay = budget.delay_bits if connection.max_delay else 0
    return weight_width(budget, layer, connection) + delay + getattr(connection, "tag_bits", 0)


def mapped_by_position(layers: Mapping[str, LayerDemand]) -> frozenset[str]:
    """Layers whose axon map has one entry per position (W, H), not one per neuron: convolutions read them, nothing else.

    So it stands in published compiler output (nine of nine layers of a detector, four of five of PilotNet): a message
    to a convolution names its position once for all channels. A layer that the host or a dense layer reads takes one
    entry per neuron.
    """
    found: dict[str, bool] = {}
    for layer in layers.values():
        for connection in layer.connections:
            source = layers[connection.source]
            shared = isinstance(connection, Convolution) and connection.input_shape == source.box
            found[source.name] = found.get(source.name, True) and shared
    return frozenset(name for name, shared in found.items() if shared)


def resources(
    layer: LayerDemand, part: Part, budget: Budget, encoding: str | None = None, *, by_position: bool = False
) -> dict[str, int]:
    """What the part takes of each resource the budget limits; output axons are counted once all parts are known.

    Args:
        layer: the part's layer.
        part: which neurons and inputs.
        budget: the accounting.
        encoding: for connections that name none; None takes the budget's.
        by_position: whether the layer is one of `mapped_by_position`.
    """
    count = part.neurons
    axons = words = longest = 0
    if part.role == "sum":
        # Each partial sum arrives by an axon of its own and reaches one neuron through one synapse of weight 1.
        each = axon_words(budget, 1, budget.weight_fields[0], "sparse", count)
        axons, words, longest = count * part.parts, count * part.parts * each, each
    else:
        for number, connection in enumerate(layer.connections):
            low, high = part.inputs[number] if part.inputs is not None else (0, connection.units)
            if low < high:
                more_axons, more_words, length = _connection(layer, part, connection, (low, high), budget, encoding)
                axons, words, longest = axons + more_axons, words + more_words, max(longest, length)
    if not layer.connections:
        axons = 1  # an input held on the chip: the host's messages come through one axon
    neurons = count * layer.compartments
    (w0, w1), (h0, h1), _ = part.box
    mapped = (w1 - w0) * (h1 - h0) if by_position and part.role != "partial" else count
    taken = {
        "neurons": neurons,
        "axon_in": axons,
        "synapse_words": words,
        "words_per_axon": longest,
        "axon_map": mapped,
        "groups": 1,
        "pool": axons + neurons + 1 + words + mapped,
    }
    return {name: taken[name] for name in RESOURCES if name in budget.limits and name in taken}


def _connection(
    layer: LayerDemand,
    part: Part,
    connection: Connection | Convolution,
    units: Span,
    budget: Budget,
    default: str | None,
) -> tuple[int, int, int]:
    """(input axons, words, longest axon) of one connection."""
    bits = _bits(budget, layer, connection)
    if isinstance(connection, Convolution):
        return _convolution(part, connection, units, budget, bits)
    count = part.neurons
    encoding = connection.encoding or ("sparse" if connection.mask is not None else default or budget.encoding)
    if connection.mask is None:
        each = axon_words(budget, count, bits, encoding, count)
        return units[1] - units[0], (units[1] - units[0]) * each, each
    import numpy as np

    degree = connection.mask[part.indices(layer.box), units[0] : units[1]].sum(axis=0)
    sizes, times = np.unique(degree[degree > 0], return_counts=True)
    lengths = [axon_words(budget, int(n) if encoding == "sparse" else count, bits, encoding, count) for n in sizes]
    used = int(times.sum())
    if budget.rule == "nxtf":
        lengths = [max(lengths, default=0)] * len(lengths)
    return used, sum(n * int(k) for n, k in zip(lengths, times, strict=True)), max(lengths, default=0)


def _convolution(part: Part, conv: Convolution, units: Span, budget: Budget, bits: int) -> tuple[int, int, int]:
    (w0, w1), (h0, h1), (c0, c1) = part.box
    per_group_in, per_group_out = conv.input_shape[2] // conv.groups, conv.channels // conv.groups
    # Input channel -> output channels of this box that it reaches, by group.
    reached = {}
    for group in range(conv.groups):
        inside = min(c1, (group + 1) * per_group_out) - max(c0, group * per_group_out)
        channels = min(units[1], (group + 1) * per_group_in) - max(units[0], group * per_group_in)
        if inside > 0 and channels > 0:
            reached[group] = (channels, inside)
    if budget.rule == "netx":
        positions = math.prod(conv.kernel)
        lengths = [(n, axon_words(budget, inside, bits, "shared", inside)) for n, inside in reached.values()]
        words = sum(channels * positions * length for channels, length in lengths)
        axons = math.ceil(part.neurons / SHARED_AXON_NEURONS)
        return axons, words, max((length for _, length in lengths), default=0)
    # Loihi 1: sources with the same pattern of targets share their synapses; each source neuron keeps its own axon.
    across, along = conv.taps(0, w0, w1), conv.taps(1, h0, h1)
    words = longest = 0
    for channels, inside in reached.values():
        lengths = [
            (channels, axon_words(budget, len(x) * len(y) * inside, bits, "sparse", part.neurons))
            for x in set(across.values())
            for y in set(along.values())
        ]
        words += sum(n * length for n, length in lengths)
        longest = max(longest, *(length for _, length in lengths), 0)
    axons = len(across) * len(along) * sum(channels for channels, _ in reached.values())
    return axons, words, longest


def synops(layer: LayerDemand, part: Part, sources: Mapping[str, LayerDemand]) -> float:
    """Synaptic operations of the part per step: messages that arrive times the synapses each one meets.

    A dense connection's stored zeros count. A convolution uses its source's mean rate.
    """
    if part.role == "sum":
        return float(part.neurons * part.parts)
    total = 0.0
    for number, connection in enumerate(layer.connections):
        low, high = part.inputs[number] if part.inputs is not None else (0, connection.units)
        source = sources[connection.source]
        if isinstance(connection, Convolution):
            (w0, w1), (h0, h1), (c0, c1) = part.box
            taps = [sum(map(len, connection.taps(axis, *span).values())) for axis, span in ((0, (w0, w1)), (1, (h0, h1)))]
            share = (high - low) / connection.input_shape[2]
            total += source.mean_rate * math.prod(taps) * (c1 - c0) * connection.input_shape[2] / connection.groups * share
        elif connection.mask is None:
            rates = source.rate
            sent = math.fsum(rates[low:high]) if isinstance(rates, tuple) else (high - low) * rates
            total += part.neurons * sent
        else:
            import numpy as np

            degree = connection.mask[part.indices(layer.box), low:high].sum(axis=0)
            each = np.broadcast_to(np.asarray(source.rate, dtype=np.float64), (connection.inputs,))
            total += float((degree * each[low:high]).sum())
    return total


def over(taken: Mapping[str, int], budget: Budget) -> tuple[str, int, int] | None:
    """The resource that is over its limit by the largest factor, as (name, used, limit); None if all fit."""
    worst = max(taken, key=lambda name: taken[name] / budget.limits[name])
    used, limit = taken[worst], budget.limits[worst]
    return (worst, used, limit) if used > limit else None
