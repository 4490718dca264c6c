"""Labels of tensor elements, and how an operation hands them on.

A label is a whole number that names the token (or the sample) that an element of a tensor belongs to; -1 stands for none.
The label of a tensor has the tensor's own shape, int32; dimensions along which it does not change have stride 0, so that it
takes B T numbers for an activation of any width. `None` in the place of a label: no element has one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NONE = -1


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


class Streams:
    """Fresh labels, a run of numbers for each place where rows begin; and which numbers turned out to be the same row."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.count = 0
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

    def merge(self, labels: Sequence[Tensor], shape: Sequence[int]) -> Tensor | None:
        """The label of an elementwise result of this shape. Elements without a label take the other operand's. Where two
        rows of one stream meet, the result is no row's own; where rows of two streams meet, the one counts that is a row
        (constant along the last dimension), that is not shared by more rows, and that began first."""
        found: Tensor | None = None
        for label in labels:
            small = narrow(label)
            small = small.view(*[1] * (len(shape) - small.dim()), *small.shape)
            found = small if found is None else self._meet(found, small)
        return None if found is None else found.expand(shape)

    def _meet(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.expand(torch.broadcast_shapes(a.shape, b.shape)), b.expand(torch.broadcast_shapes(a.shape, b.shape))
        clash = (a >= 0) & (b >= 0) & (a != b)
        if not bool(clash.any()):
            return narrow(a.where(a >= 0, b))
        starts = torch.tensor(self.starts, dtype=torch.int32, device=a.device)
        same = torch.bucketize(a.contiguous(), starts, right=True) == torch.bucketize(b.contiguous(), starts, right=True)
        first, second = (a, b) if self._rank(a) >= self._rank(b) else (b, a)
        both = torch.stack((second[clash & ~same], first[clash & ~same]))
        if both.shape[1]:
            pairs = torch.unique(both, dim=1)
            if pairs.shape[1] == len(torch.unique(pairs[0])):  # one row meets one row
                self.pairs.append(pairs)
        found = first.where(first >= 0, second)
        return narrow(found.where(~(clash & same), torch.full_like(found, NONE)))

    @staticmethod
    def _rank(label: Tensor) -> tuple[bool, int, int]:
        values = torch.unique(narrow(label))
        values = values[values >= 0]
        return label.shape[-1] == 1 or label.stride(-1) == 0, len(values), -int(values[0])

    def rows_of(self, labels: Tensor) -> Tensor:
        """Loss rows of every label, int64 (count,), NONE where it is no row of the loss, for `labels`, those of the loss's
        own rows. Two rows with one label stand for no row at all."""
        flat = labels.flatten().long()
        known = flat >= 0
        rows = torch.full((self.count + 1,), NONE, dtype=torch.int64, device=labels.device)
        if len(torch.unique(flat[known])) < int(known.sum()):
            return rows[:-1]
        rows[flat[known]] = torch.arange(len(flat), device=labels.device)[known]
        for _ in range(2):
            for pairs in reversed(self.pairs):
                young, old = pairs.long()
                rows[young] = rows[young].where(rows[young] >= 0, rows[old])
                rows[old] = rows[old].where(rows[old] >= 0, rows[young])
        return rows[:-1]


def product(a: Tensor | None, b: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """The label of a matrix product (..., M, K) @ (..., K, N): a row of the first factor, else a column of the second."""
    parts = []
    if a is not None:
        parts.append(uniform(a, [-1]))
    if b is not None:
        parts.append(uniform(b, [-2]))
    if not parts:
        return None
    found = parts[0].expand(*parts[0].shape[:-2], *shape[-2:])
    if len(parts) > 1:
        found = found.where(found >= 0, parts[1].expand(*parts[1].shape[:-2], *shape[-2:]))
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
