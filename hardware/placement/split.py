"""A layer becomes parts that fit one core each: by outputs, balanced in synaptic operations; by inputs where it must.

Two ways to split: ``"fewest"`` takes the fewest parts that fit (of a box (W, H, C) equal boxes, cut along all three
axes); ``"compiler"`` repeats what published logs of Intel's compiler show (the ratio of need to limit, multiplied until
it fits; convolutions along W by the largest power of two), where one column fits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from hardware.chips.budget import Budget
from hardware.placement.boxes import BoxSearch, Fits, even, received
from hardware.placement.cost import Box, Part, Span, over, resources, synops
from hardware.placement.demand import Convolution, LayerDemand
from hardware.text import quoted

SPLITS = ("fewest", "compiler")


@dataclasses.dataclass(frozen=True)
class Room:
    """What a core offers the parts of one layer, and how they are counted.

    Attributes:
        layer, budget: whose parts, and what a core holds.
        encoding: for connections that name none.
        graded: whether the chip sends graded messages.
        most_neurons: cap on neurons per part; None for the budget's alone.
        by_position: as for `resources`.
    """

    layer: LayerDemand
    budget: Budget
    encoding: str | None
    graded: bool
    most_neurons: int | None
    by_position: bool

    def need(self, part: Part) -> dict[str, int]:
        """What a part takes of each resource."""
        return resources(self.layer, part, self.budget, self.encoding, by_position=self.by_position)

    def over(self, part: Part) -> tuple[str, int, int] | None:
        """The resource that a part exceeds by the largest factor, as (name, used, limit)."""
        return over(self.need(part), self.budget)

    @property
    def neurons(self) -> int:
        """Neurons that a part has at most."""
        most = self.budget.limits["neurons"] // self.layer.compartments
        return most if self.most_neurons is None else min(most, self.most_neurons)

    def search(self, fits: Fits) -> BoxSearch:
        """The boxes of the layer for which ``fits`` holds."""
        return BoxSearch(self.layer, fits, self.neurons)


class CannotSplit(ValueError):
    """No part of this layer, however small, fits one core; or not as many cores as asked for suffice."""

    def __init__(self, layer: LayerDemand, taken: tuple[str, int, int], remedy: str, where: str) -> None:
        super().__init__(f"layer {quoted(layer.name)}: {where}: {taken[0]} {taken[1]:,} of {taken[2]:,}")
        self.layer, self.taken, self.remedy, self.where = layer, taken, remedy, where


def split_layer(
    layer: LayerDemand,
    budget: Budget,
    sources: Mapping[str, LayerDemand],
    *,
    graded: bool,
    split: str = "fewest",
    encoding: str | None = None,
    most_neurons: int | None = None,
    by_position: bool = False,
) -> tuple[Part, ...]:
    """The parts of one layer, in the order of its neurons; partial parts stand before the sum they feed.

    Args:
        layer: what to place.
        budget: what a core holds.
        sources: all layers by name, for their rates.
        graded: whether the chip sends graded messages (a partial sum needs them).
        split: ``"fewest"`` or ``"compiler"``.
        encoding: for connections that name none.
        most_neurons: cap on neurons per part (output axons can ask for one).
        by_position: whether the axon map has one entry per position (W, H) instead of one per neuron.

    Raises:
        CannotSplit: nothing fits, with the binding resource.
        TooWide: a weight or delay that no synapse holds.
    """
    room = Room(layer, budget, encoding, graded, most_neurons, by_position)

    def part_of(box: Box) -> Part:
        return Part(layer.name, box)

    search = room.search(lambda box: room.over(part_of(box)) is None)
    full: Box = ((0, layer.box[0]), (0, layer.box[1]), (0, layer.box[2]))
    load = _loads(layer, sources)
    if layer.cores is not None:
        boxes = [(span, full[1], full[2]) for span in _balanced(load, min(layer.cores, layer.box[0]))]
        bad = next((box for box in boxes if not search.fits(box)), None)
        if bad is not None or len(boxes) != layer.cores:
            boxes = search.exactly(layer.cores) or []
        if boxes:
            return tuple(map(part_of, boxes))
        taken = room.over(part_of(bad or full))
        free = dataclasses.replace(layer, cores=None)
        needed = len(
            split_layer(free, budget, sources, graded=graded, split=split, encoding=encoding, by_position=by_position)
        )
        where = f"asked for on {layer.cores} core{'s' * (layer.cores > 1)}"
        raise CannotSplit(layer, taken or ("cores", needed, layer.cores), f"split {{name}} over {needed} cores", where)
    found: list[Box] | None = None
    if split == "compiler" and most_neurons is None:
        found = _as_compiler(room, full)
    if found is None:
        found = _fewest(search, load)
    if found is not None:
        return tuple(map(part_of, found))
    return _by_inputs(room, load)


def _loads(layer: LayerDemand, sources: Mapping[str, LayerDemand]) -> list[float]:
    """Synaptic operations of each column W, for balance; all equal where every column has the same synapses."""
    width, height, channels = layer.box
    if not any(getattr(connection, "mask", None) is not None for connection in layer.connections) and not any(
        isinstance(connection, Convolution) and any(connection.padding) for connection in layer.connections
    ):
        return [1.0] * width
    columns = [Part(layer.name, ((w, w + 1), (0, height), (0, channels))) for w in range(width)]
    return [synops(layer, column, sources) for column in columns]


def _balanced(load: Sequence[float], parts: int) -> list[Span]:
    """Contiguous ranges, none empty, whose largest load is as small as can be (by bisection on it)."""
    if min(load) == max(load):
        return even(len(load), parts)
    low, high = max(max(load), math.fsum(load) / parts), math.fsum(load) * (1 + 1e-9)
    best = None
    for _ in range(40):
        middle = (low + high) / 2
        spans = _filled(load, parts, middle)
        if spans is None:
            low = middle
        else:
            best, high = spans, middle
    return best or even(len(load), parts)


def _filled(load: Sequence[float], parts: int, most: float) -> list[Span] | None:
    spans: list[Span] = []
    start, total = 0, 0.0
    for place, value in enumerate(load):
        left = len(load) - place
        if place > start and (total + value > most or left == parts - len(spans) - 1):
            spans.append((start, place))
            start, total = place, 0.0
        total += value
    spans.append((start, len(load)))
    return spans if len(spans) == parts and all(math.fsum(load[a:b]) <= most for a, b in spans) else None


def _spans(length: int, load: Sequence[float] | None, good: Callable[[Span], bool]) -> list[Span] | None:
    """The fewest ranges of one axis that are all good, balanced; None if single columns are not good."""
    if good((0, length)):
        return [(0, length)]
    if not all(good((place, place + 1)) for place in (range(length) if load is not None else (0,))):
        return None
    # The longest run that is good everywhere bounds the number of parts; the exact number is found from there.
    low, high = 1, length
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good((0, middle)) else (low, middle - 1)
    for parts in range(max(2, math.ceil(length / (2 * low + 1))), length + 1):
        for spans in (_balanced(load, parts), even(length, parts)) if load is not None else (even(length, parts),):
            if all(good(span) for span in spans):
                return spans
    return None


def _fewest(search: BoxSearch, load: Sequence[float], most: int | None = None) -> list[Box] | None:
    """Slices along W, balanced in synaptic operations, or equal boxes where those are fewer or receive fewer messages.

    Args:
        search: the layer and the test.
        load: synaptic operations of each column W.
        most: boxes there may be; None for any number.
    """
    width, height, channels = search.layer.box
    varied = load if min(load) != max(load) else None
    spans = _spans(width, varied, lambda w: search.fits((w, (0, height), (0, channels))))
    slices: list[Box] = [(w, (0, height), (0, channels)) for w in spans or ()]
    if height * channels == 1:
        return slices or None
    if slices and (most is None or len(slices) < most):
        most = len(slices)
    boxes = search.fewest(most)
    if boxes is None or (len(slices) == len(boxes) and received(search.layer, slices) <= received(search.layer, boxes)):
        return slices or None
    return boxes


def _as_compiler(room: Room, full: Box) -> list[Box] | None:
    width, limits = room.layer.box[0], room.budget.limits

    def boxes(size: int) -> list[Box]:
        return [((low, min(low + size, width)), full[1], full[2]) for low in range(0, width, size)]

    def excess(size: int) -> int:
        """By what whole factor the fullest slice is over a limit; 1 if none is."""
        factor = 1
        for box in boxes(size):
            need = room.need(Part(room.layer.name, box))
            factor = max(factor, *(math.ceil(need[name] / limits[name]) for name in need))
        return factor

    if room.layer.box[1:] != (1, 1):
        size = 1 << (width.bit_length() - 1)
        while size > 1 and excess(size) > 1:
            size //= 2
    else:
        ratio, size = 1, width
        while size > 1 and (more := excess(size)) > 1:
            ratio *= more
            size = math.ceil(width / ratio)
    return boxes(size) if excess(size) == 1 else None


def _by_inputs(room: Room, load: Sequence[float]) -> tuple[Part, ...]:
    """Partial sums on cores of their own, added up on another; the cheapest number of input ranges is looked for."""
    layer, limits = room.layer, room.budget.limits
    units = [connection.units for connection in layer.connections]
    total = sum(units)
    alone = room.need(Part(layer.name, _fullest(layer)))
    taken = over(alone, room.budget)
    if taken is None:
        name = "neurons" if layer.compartments > 1 else max(alone, key=lambda key: alone[key] / limits[key])
        taken = (name, alone[name], room.most_neurons or limits[name])
    where = "even one neuron of it"
    if not room.graded:
        raise CannotSplit(layer, taken, "prune inputs of {name}; partial sums need graded messages (Loihi 2)", where)
    if total < 2 or over({"neurons": alone["neurons"]}, room.budget) is not None:
        raise CannotSplit(layer, taken, "fewer compartments per neuron in {name}", where)
    best: tuple[int, list[Box], list[tuple[Span, ...]]] | None = None
    start = max(2, max(math.ceil(alone[name] / limits[name]) for name in alone if name != "groups"))
    for count in range(start, min(total, 4 * start + 16) + 1):
        ranges = [_ranges(units, span) for span in even(total, count)]

        def fits(box: Box, ranges: list[tuple[Span, ...]] = ranges, count: int = count) -> bool:
            parts = [Part(layer.name, box, "sum", None, count)]
            parts += [Part(layer.name, box, "partial", inputs) for inputs in ranges]
            return all(room.over(part) is None for part in parts)

        most = None if best is None else (best[0] - 1) // (count + 1)
        boxes = _fewest(room.search(fits), [1.0] * len(load), most) if most != 0 else None
        if boxes is not None and (best is None or len(boxes) * (count + 1) < best[0]):
            best = (len(boxes) * (count + 1), boxes, ranges)
    if best is None:
        raise CannotSplit(layer, taken, "fewer inputs to {name}", where)
    found: list[Part] = []
    for box in best[1]:
        found += [Part(layer.name, box, "partial", inputs) for inputs in best[2]]
        found.append(Part(layer.name, box, "sum", None, len(best[2])))
    return tuple(found)


def _fullest(layer: LayerDemand) -> Box:
    """The neuron that most inputs reach: of a padded convolution an inner one, not one at the border."""
    import numpy as np

    reach = np.zeros(layer.box, dtype=np.int64)
    for connection in layer.connections:
        if isinstance(connection, Convolution):
            counts = [
                np.array([len(connection.taps(axis, at, at + 1)) for at in range(layer.box[axis])]) for axis in (0, 1)
            ]
            per_position = connection.input_shape[2] // connection.groups
            reach += counts[0][:, None, None] * counts[1][None, :, None] * per_position
        elif connection.mask is not None:
            reach += connection.mask.sum(axis=1).reshape(layer.box)
    w, h, c = (int(place) for place in np.unravel_index(int(reach.argmax()), reach.shape))
    return (w, w + 1), (h, h + 1), (c, c + 1)


def _ranges(units: Sequence[int], span: Span) -> tuple[Span, ...]:
    """A range over all connections' inputs one after the other, as a range of each."""
    found, start = [], 0
    for size in units:
        low, high = max(span[0] - start, 0), min(span[1] - start, size)
        found.append((min(low, size), max(high, min(low, size))))
        start += size
    return tuple(found)
