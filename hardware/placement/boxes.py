"""A layer (W, H, C) cut into the fewest equal boxes that all fit one core: a closed loop over the cuts of its three axes.

Weights of a convolution are shared over W and H: only cuts along C free synapse words, cuts along W and H free neurons
and the words that go with them. So the three numbers of cuts are looked for together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence

from hardware.placement.cost import Box, Span
from hardware.placement.demand import Convolution, LayerDemand

Fits = Callable[[Box], bool]


def even(length: int, parts: int) -> list[Span]:
    """So many ranges of one axis, none longer than another by more than one; the longer ones first."""
    size, rest = divmod(length, parts)
    ends = [0]
    for number in range(parts):
        ends.append(ends[-1] + size + (number < rest))
    return list(itertools.pairwise(ends))


def received(layer: LayerDemand, boxes: Sequence[Box]) -> int:
    """Neurons of the sources that boxes need, each counted once for every box and convolution that needs it."""
    total = 0
    for conv in layer.connections:
        if isinstance(conv, Convolution):
            reach = [{span: len(conv.taps(axis, *span)) for span in {box[axis] for box in boxes}} for axis in (0, 1)]
            total += sum(reach[0][w] * reach[1][h] * _channels(conv, c) for w, h, c in boxes)
        else:
            total += conv.inputs * len(boxes)
    return total


class BoxSearch:
    """The boxes of one layer under one test.

    Args:
        layer: what to cut.
        fits: whether a box fits a core. Boxes that no count can tell apart (the same lengths, the same pattern of
            kernel positions) are asked about once.
        most_neurons: neurons that a box must not exceed, checked before ``fits`` is asked.
    """

    def __init__(self, layer: LayerDemand, fits: Fits, most_neurons: int) -> None:
        self.layer, self.most_neurons = layer, most_neurons
        self._ask = fits
        self._known: dict[tuple[Hashable, Hashable, Hashable], bool] = {}
        self._alike: dict[tuple[int, Span], Hashable] = {}
        self._kinds: dict[tuple[int, int], list[Span]] = {}
        # Numbers of cuts along C, ascending; of those with the same deepest part only the smallest.
        self._counts = sorted({math.ceil(layer.box[2] / size) for size in range(1, layer.box[2] + 1)})
        convolutions = [c for c in layer.connections if isinstance(c, Convolution)]
        self._grouped = any(c.groups > 1 for c in convolutions)
        self._masked = any(getattr(c, "mask", None) is not None for c in layer.connections)

    def fits(self, box: Box) -> bool:
        """The test, remembered."""
        if math.prod(high - low for low, high in box) > self.most_neurons:
            return False
        key = (self._kind(0, box[0]), self._kind(1, box[1]), self._kind(2, box[2]))
        if key not in self._known:
            self._known[key] = self._ask(box)
        return self._known[key]

    def fewest(self, most: int | None = None) -> list[Box] | None:
        """The fewest equal boxes that all fit, and of those the cut that receives the fewest messages.

        Args:
            most: boxes there may be; None for any number.

        Returns:
            The boxes by W, then H, then C; None if no cut into at most so many fits.
        """
        width, height, _ = self.layer.box
        middle = tuple((size // 2, size // 2 + 1) for size in self.layer.box)
        if not self.fits(middle):  # type: ignore[arg-type]
            return None
        limit = self.layer.neurons if most is None else most
        best: tuple[int, int] | None = None
        found: list[Box] | None = None
        pairs = sorted(
            (pair for pair in itertools.product(range(1, width + 1), range(1, height + 1)) if math.prod(pair) <= limit),
            key=lambda pair: (math.prod(pair), pair),
        )
        for w, h in pairs:
            if w * h > limit:
                break
            c = self._fewest_channels(w, h, limit // (w * h))
            if c is None:
                continue
            boxes = list(self._boxes(w, h, c))
            key = (len(boxes), received(self.layer, boxes))
            if best is None or key < best:
                best, found, limit = key, boxes, len(boxes)
        return found

    def exactly(self, count: int) -> list[Box] | None:
        """So many equal boxes that all fit, the cut that receives the fewest messages; None if there is none."""
        width, height, channels = self.layer.box
        cuts = [
            (w, h, count // (w * h))
            for w in range(1, min(width, count) + 1)
            if count % w == 0
            for h in range(1, min(height, count // w) + 1)
            if count // w % h == 0 and count // (w * h) <= channels
        ]
        good = [boxes for cut in cuts if all(map(self.fits, boxes := list(self._boxes(*cut))))]
        return min(good, key=lambda boxes: received(self.layer, boxes), default=None)

    def _fewest_channels(self, w: int, h: int, most: int) -> int | None:
        """The smallest number of cuts along C, at most so many, with which every box of a cut w x h fits."""
        channels = self.layer.box[2]

        def good(c: int) -> bool:
            return all(map(self.fits, itertools.product(*(self._different(axis, n) for axis, n in enumerate((w, h, c))))))  # type: ignore[arg-type]

        if self._grouped or self._masked:  # a cut that straddles groups can need more than a coarser one
            return next((c for c in range(1, min(channels, most) + 1) if good(c)), None)
        counts = [c for c in self._counts if c <= most]
        low, high = 0, len(counts)
        while low < high:
            at = (low + high) // 2
            low, high = (low, at) if good(counts[at]) else (at + 1, high)
        return counts[low] if low < len(counts) else None

    def _boxes(self, w: int, h: int, c: int) -> Iterator[Box]:
        return itertools.product(*(even(size, parts) for size, parts in zip(self.layer.box, (w, h, c), strict=True)))  # type: ignore[return-value]

    def _different(self, axis: int, parts: int) -> list[Span]:
        """Of an axis in so many parts, one range of each kind."""
        if (axis, parts) not in self._kinds:
            spans = even(self.layer.box[axis], parts)
            self._kinds[axis, parts] = list({self._kind(axis, span): span for span in spans}.values())
        return self._kinds[axis, parts]

    def _kind(self, axis: int, span: Span) -> Hashable:
        """The same for ranges that differ in nothing a core's memory depends on."""
        if (axis, span) not in self._alike:
            kind: Hashable = span
            if not self._masked and axis == 2 and not self._grouped:
                kind = span[1] - span[0]
            elif not self._masked and axis < 2:
                taps = [c.taps(axis, *span) for c in self.layer.connections if isinstance(c, Convolution)]
                patterns = tuple((len(tap), frozenset(tap.values())) for tap in taps)
                kind = (span[1] - span[0], patterns)
            self._alike[axis, span] = kind
        return self._alike[axis, span]


def _channels(conv: Convolution, span: Span) -> int:
    """Input channels that reach a range of output channels."""
    per_in, per_out = conv.input_shape[2] // conv.groups, conv.channels // conv.groups
    return per_in * ((span[1] - 1) // per_out - span[0] // per_out + 1)
