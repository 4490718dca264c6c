"""Labels of tensor elements, and how an operation hands them on.

A label is a whole number that names the token (or the sample) that an element of a tensor belongs to; -1 stands for none.
The label of a tensor has the tensor's own shape, int32; dimensions along which it does not change have stride 0, so that it
takes B T numbers for an activation of any width. `None` in the place of a label: no element has one. A label with the bit
DATA holds in this forward alone: the element came to its place by an index that was computed from the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NONE = -1
DATA = 1 << 30


def narrow(label: Tensor) -> Tensor:
    """The same label with every constant dimension cut to size 1."""
    for d, (size, stride) in enumerate(zip(label.shape, label.stride(), strict=True)):
        if stride == 0 and size > 1:
            label = label.narrow(d, 0, 1)
    return label


def compress(label: Tensor) -> Tensor | None:
    """The same label with stride 0 along its last dimensions wherever nothing changes there; None where all are NONE."""
    small, shape = narrow(label), label.shape
    for d in reversed(range(small.dim())):
        if small.shape[d] > 1:
            first = small.narrow(d, 0, 1)
            if not bool((small == first).all()):
                break
            small = first
    if not small.numel() or bool((small < 0).all()):
        return None
    if small.untyped_storage().nbytes() > 2 * small.numel() * small.element_size():  # a view that holds a whole label
        small = small.clone()
    return small.expand(shape)


def uniform(label: Tensor, dims: Sequence[int]) -> Tensor:
    """The label where it is the same all along `dims`, else NONE; these dimensions stay, with size 1."""
    dims = [d % label.dim() for d in dims]
    small = narrow(label)
    if all(small.shape[d] == 1 for d in dims):
        shape = [1 if d in dims else n for d, n in enumerate(label.shape)]
        return small.expand(shape)
    low, high = small.amin(dims, keepdim=True), small.amax(dims, keepdim=True)
    shape = [1 if d in dims else n for d, n in enumerate(label.shape)]
    return low.where(low == high, torch.full_like(low, NONE)).expand(shape)


def settled(label: Tensor) -> Tensor:
    """The same label without DATA."""
    return label.where(label < 0, label & (DATA - 1))


def moved_by_data(label: Tensor) -> Tensor:
    """The same label with DATA."""
    return label.where(label < 0, label | DATA)


class Streams:
    """Fresh labels, a run of numbers for each place where rows begin; and which numbers turned out to be the same row.

    `whole`: labels are those of whole samples, which have nothing to do with each other.
    """

    def __init__(self, whole: bool = False) -> None:
        self.whole = whole
        self.starts: list[int] = []
        self.count = self.samples = 0
        self.marks: list[int] = []
        """first label of each forward"""
        self.pairs: list[Tensor] = []
        """(2, M): a label, and the older one that it always meets"""

    def fresh(self, lead: Sequence[int], device: torch.device) -> Tensor:
        """New labels of shape `lead`."""
        size = 1
        for n in lead:
            size *= n
        self.starts.append(self.count)
        self.count += size
        return torch.arange(self.count - size, self.count, dtype=torch.int32, device=device).view(*lead)

    def begin(self) -> None:
        """A forward begins, whose batch may be of another size."""
        self.marks.append(self.count)
        self.samples = 0

    def fits(self, size: int) -> bool:
        """Whether so many samples are as many as this forward's others."""
        self.samples = self.samples or size
        return size == self.samples

    def merge(self, labels: Sequence[Tensor], shape: Sequence[int]) -> Tensor | None:
        """The label of an elementwise result of this shape. Elements without a label take the other operand's. Where two
        rows of one stream meet, see `_own`; where rows of two streams meet, the one counts that is a row (constant along
        the last dimension), that is not shared by more rows, and that began first."""
        found: Tensor | None = None
        for label in labels:
            small = narrow(label)
            small = small.view(*[1] * (len(shape) - small.dim()), *small.shape)
            found = small if found is None else self._meet(found, small)
        return None if found is None else found.expand(shape)

    def _meet(self, first: Tensor, second: Tensor) -> Tensor:
        size = torch.broadcast_shapes(first.shape, second.shape)
        a, b = settled(first).expand(size), settled(second).expand(size)
        found, clash = a.where(a >= 0, b), (a >= 0) & (b >= 0) & (a != b)
        if bool(clash.any()):
            starts = torch.tensor(self.starts, dtype=torch.int32, device=a.device)
            same = torch.bucketize(a.contiguous(), starts, right=True) == torch.bucketize(
                b.contiguous(), starts, right=True
            )
            old, young = (a, b) if self._rank(a) >= self._rank(b) else (b, a)
            both = torch.stack((young[clash & ~same], old[clash & ~same]))
            if both.shape[1]:
                pairs = torch.unique(both, dim=1)
                if pairs.shape[1] == len(torch.unique(pairs[0])):  # one row meets one row
                    self.pairs.append(pairs)
            found = old.where(old >= 0, young)
            if bool((clash & same).any()):
                found = found.where(~(clash & same), self._own(a, b))
        # an operand that is in its place whatever the inputs says where the result is
        moved = (found >= 0) & ~((found == first) | (found == second))
        return narrow(found.where(~moved, found | DATA))

    def _own(self, a: Tensor, b: Tensor) -> Tensor:
        """Which of two rows of one stream a mixture of both is. All rows of the stream beside some of them, or beside
        moved ones with gaps: the mixture is the row of the former (a token mixed with the one before it, a skip
        connection). Parts of the stream both: the later row, as in a recurrence. Else, and for samples, neither."""
        none = torch.full_like(a, NONE)
        if self.whole:
            return none
        full_a, full_b = self._complete(a), self._complete(b)
        if full_a and full_b:
            return none
        return a if full_a else b if full_b else torch.maximum(a, b)

    def _complete(self, label: Tensor) -> bool:
        values = narrow(label).flatten()
        low = int(values.min())
        if low not in self.starts:
            return False
        stop = min((start for start in self.starts if start > low), default=self.count)
        every = torch.arange(low, stop, dtype=values.dtype, device=values.device)
        return len(values) == stop - low and torch.equal(values.sort().values, every)

    @staticmethod
    def _rank(label: Tensor) -> tuple[bool, int, int]:
        values = torch.unique(narrow(label))
        values = values[values >= 0]
        return label.shape[-1] == 1 or label.stride(-1) == 0, len(values), -int(values[0])

    def rows_of(self, labels: Tensor) -> Tensor:
        """Loss rows of every label, int64 (count,), NONE where it is no row of the loss, for `labels`, those of the loss's
        own rows. Two rows with one label stand for no row at all."""
        flat = labels.flatten().long()
        known = (flat >= 0) & (flat < DATA)
        rows = torch.full((self.count + 1,), NONE, dtype=torch.int64, device=labels.device)
        if len(torch.unique(flat[known])) < int(known.sum()):
            return rows[:-1]
        rows[flat[known]] = torch.arange(len(flat), device=labels.device)[known]
        return self.linked(rows)[:-1]

    def linked(self, rows: Tensor) -> Tensor:
        """Rows of labels, handed on to those that were found to be the same row."""
        before = -1
        while (known := int((rows >= 0).sum())) != before:
            before = known
            for pairs in reversed(self.pairs):
                young, old = pairs.long()
                rows[young] = rows[young].where(rows[young] >= 0, rows[old])
                rows[old] = rows[old].where(rows[old] >= 0, rows[young])
        return rows


def product(a: Tensor | None, b: Tensor | None, shape: Sequence[int], samples: Streams | None = None) -> Tensor | None:
    """The label of a matrix product (..., M, K) @ (..., K, N): a row of the first factor, else a column of the second.

    `samples`: labels are whole samples, whose streams say what is made of two of them.
    """
    parts = []
    if a is not None:
        parts.append(uniform(a, [-1]).expand(*a.shape[:-1], shape[-1]))
    if b is not None:
        parts.append(uniform(b, [-2]).expand(*b.shape[:-2], *shape[-2:]))
    if not parts:
        return None
    if len(parts) == 1:
        found = parts[0]
    elif samples is None:
        found = parts[0].where(parts[0] >= 0, parts[1])
    else:
        merged = samples.merge(parts, shape)
        assert merged is not None
        found = merged
    return compress(found.expand(shape))


def convolved(
    label: Tensor,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor | None:
    """The label of a convolution's output (B, C, *S): one place goes over into one place where the stride is 1 and the
    padding that of a causal or of a centred kernel; None where places do not correspond."""
    small = narrow(uniform(label, [1]))
    if small.numel() == small.shape[0]:  # whole samples
        return small.expand(shape)
    for d, (size, step, pad, apart) in enumerate(zip(kernel, stride, padding, dilation, strict=True), 2):
        reach = (size - 1) * apart
        if step != 1:
            return None
        if pad in (reach, reach / 2):
            offset = 0
        else:  # padded by hand before: unlabelled places in front
            known = (small >= 0).movedim(d, 0).flatten(1).any(1)
            front = int(known.int().argmax()) + pad
            if front not in (reach, reach / 2):
                return None
            offset = front - pad
        small = _shift(small, d, offset, shape[d])
    return compress(small.expand(shape))


def _shift(label: Tensor, dim: int, offset: int, size: int) -> Tensor:
    """Place j of the result is place j + offset of `label`, NONE behind its end."""
    index = torch.arange(offset, offset + size, device=label.device)
    taken = label.index_select(dim, index.clamp(max=label.shape[dim] - 1))
    outside = (index >= label.shape[dim]).view(*[-1 if d == dim else 1 for d in range(label.dim())])
    return taken.masked_fill(outside, NONE)
