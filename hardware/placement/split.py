"""A layer becomes parts that fit one core each: by outputs, balanced in synaptic operations; by inputs where it must.

Two ways to split: ``"fewest"`` takes the fewest parts that fit; ``"compiler"`` repeats what published logs of Intel's
compiler show (the ratio of need to limit, multiplied until it fits; convolutions along W by the largest power of two).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from hardware.chips.budget import Budget
from hardware.placement.cost import Box, Part, Span, over, resources, synops
from hardware.placement.demand import Convolution, LayerDemand
from hardware.text import quoted

SPLITS = ("fewest", "compiler")
Fits = Callable[[Box], bool]


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

    Raises:
        CannotSplit: nothing fits, with the binding resource.
        TooWide: a weight or delay that no synapse holds.
    """

    def part_of(box: Box) -> Part:
        return Part(layer.name, box)

    def fits(box: Box) -> bool:
        small = most_neurons is None or math.prod(high - low for low, high in box) <= most_neurons
        return small and over(resources(layer, part_of(box), budget, encoding), budget) is None

    full: Box = ((0, layer.box[0]), (0, layer.box[1]), (0, layer.box[2]))
    load = _loads(layer, sources)
    if layer.cores is not None:
        boxes = [(span, full[1], full[2]) for span in _balanced(load, min(layer.cores, layer.box[0]))]
        bad = next((box for box in boxes if not fits(box)), None)
        if bad is None and len(boxes) == layer.cores:
            return tuple(map(part_of, boxes))
        taken = over(resources(layer, part_of(bad or full), budget, encoding), budget)
        needed = len(split_layer(_free(layer), budget, sources, graded=graded, split=split, encoding=encoding))
        where = f"asked for on {layer.cores} core{'s' * (layer.cores > 1)}"
        raise CannotSplit(layer, taken or ("cores", needed, layer.cores), f"split {{name}} over {needed} cores", where)
    found: list[Box] | None = None
    if split == "compiler" and most_neurons is None:
        found = _as_compiler(layer, full, budget, encoding)
    if found is None:
        found = _fewest(full, fits, load)
    if found is not None:
        return tuple(map(part_of, found))
    return _by_inputs(layer, budget, load, graded=graded, encoding=encoding, most_neurons=most_neurons)


def _free(layer: LayerDemand) -> LayerDemand:
    return dataclasses.replace(layer, cores=None)


def _loads(layer: LayerDemand, sources: Mapping[str, LayerDemand]) -> list[float]:
    """Synaptic operations of each column W, for balance; all equal where every column has the same synapses."""
    width, height, channels = layer.box
    if not any(getattr(connection, "mask", None) is not None for connection in layer.connections) and not any(
        isinstance(connection, Convolution) and any(connection.padding) for connection in layer.connections
    ):
        return [1.0] * width
    columns = [Part(layer.name, ((w, w + 1), (0, height), (0, channels))) for w in range(width)]
    return [synops(layer, column, sources) for column in columns]


def _even(length: int, parts: int) -> list[Span]:
    size, rest = divmod(length, parts)
    ends = [0]
    for number in range(parts):
        ends.append(ends[-1] + size + (number < rest))
    return list(itertools.pairwise(ends))


def _balanced(load: Sequence[float], parts: int) -> list[Span]:
    """Contiguous ranges, none empty, whose largest load is as small as can be (by bisection on it)."""
    if min(load) == max(load):
        return _even(len(load), parts)
    low, high = max(max(load), math.fsum(load) / parts), math.fsum(load) * (1 + 1e-9)
    best = None
    for _ in range(40):
        middle = (low + high) / 2
        spans = _filled(load, parts, middle)
        if spans is None:
            low = middle
        else:
            best, high = spans, middle
    return best or _even(len(load), parts)


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
        for spans in (_balanced(load, parts), _even(length, parts)) if load is not None else (_even(length, parts),):
            if all(good(span) for span in spans):
                return spans
    return None


def _fewest(full: Box, fits: Fits, load: Sequence[float]) -> list[Box] | None:
    """Cut along W; where one column is too much along H too; then along C."""
    varied = load if min(load) != max(load) else None
    width, height, channels = (span[1] for span in full)
    rows, depths = full[1], full[2]
    spans = _spans(width, varied or None, lambda w: fits((w, rows, depths)))
    if spans is not None:
        return [(w, rows, depths) for w in spans]
    columns = [(w, w + 1) for w in range(width)]
    spans = _spans(height, [1.0] * height, lambda h: all(fits((w, h, depths)) for w in _ends(columns)))
    if spans is not None and all(fits((w, h, depths)) for w in columns for h in spans):
        return [(w, h, depths) for w in columns for h in spans]
    cells = [(h, h + 1) for h in range(height)]
    if channels > 1:
        spans = _spans(
            channels, [1.0] * channels, lambda c: all(fits((w, h, c)) for w in _ends(columns) for h in _ends(cells))
        )
        if spans is not None and all(fits((w, h, c)) for w in columns for h in cells for c in spans):
            return [(w, h, c) for w in columns for h in cells for c in spans]
    return None


def _ends(spans: Sequence[Span]) -> Sequence[Span]:
    return spans if len(spans) < 4 else (spans[0], spans[len(spans) // 2], spans[-1])


def _as_compiler(layer: LayerDemand, full: Box, budget: Budget, encoding: str | None) -> list[Box] | None:
    width = layer.box[0]

    def boxes(size: int) -> list[Box]:
        return [((low, min(low + size, width)), full[1], full[2]) for low in range(0, width, size)]

    def excess(size: int) -> int:
        """By what whole factor the fullest slice is over a limit; 1 if none is."""
        factor = 1
        for box in boxes(size):
            need = resources(layer, Part(layer.name, box), budget, encoding)
            factor = max(factor, *(math.ceil(need[name] / budget.limits[name]) for name in need))
        return factor

    if layer.box[1:] != (1, 1):
        size = 1 << (width.bit_length() - 1)
        while size > 1 and excess(size) > 1:
            size //= 2
    else:
        ratio, size = 1, width
        while size > 1 and (more := excess(size)) > 1:
            ratio *= more
            size = math.ceil(width / ratio)
    return boxes(size) if excess(size) == 1 else None


def _by_inputs(
    layer: LayerDemand,
    budget: Budget,
    load: Sequence[float],
    *,
    graded: bool,
    encoding: str | None,
    most_neurons: int | None,
) -> tuple[Part, ...]:
    """Partial sums on cores of their own, added up on another; the cheapest number of input ranges is looked for."""
    units = [connection.units for connection in layer.connections]
    total = sum(units)
    alone = resources(layer, Part(layer.name, _fullest(layer)), budget, encoding)
    taken = over(alone, budget)
    if taken is None:
        name = "neurons" if layer.compartments > 1 else max(alone, key=lambda key: alone[key] / budget.limits[key])
        taken = (name, alone[name], most_neurons or budget.limits[name])
    where = "even one neuron of it"
    if not graded:
        raise CannotSplit(layer, taken, "prune inputs of {name}; partial sums need graded messages (Loihi 2)", where)
    if total < 2 or over({"neurons": alone["neurons"]}, budget) is not None:
        raise CannotSplit(layer, taken, "fewer compartments per neuron in {name}", where)
    best: tuple[int, list[Box], list[tuple[Span, ...]]] | None = None
    start = max(2, max(math.ceil(alone[name] / budget.limits[name]) for name in alone if name != "groups"))
    for count in range(start, min(total, 4 * start + 16) + 1):
        ranges = [_ranges(units, span) for span in _even(total, count)]

        def fits(box: Box, ranges: list[tuple[Span, ...]] = ranges, count: int = count) -> bool:
            small = most_neurons is None or math.prod(high - low for low, high in box) <= most_neurons
            parts = [Part(layer.name, box, "sum", None, count)]
            parts += [Part(layer.name, box, "partial", inputs) for inputs in ranges]
            return small and all(over(resources(layer, part, budget, encoding), budget) is None for part in parts)

        boxes = _fewest(((0, layer.box[0]), (0, layer.box[1]), (0, layer.box[2])), fits, [1.0] * len(load))
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
