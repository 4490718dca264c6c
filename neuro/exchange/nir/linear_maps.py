"""Linear nodes of NIR, one behind the other, as one convolution where they are one, else as one matrix.

NIR's grids run over (channel, x, y), ours over (x, y, channel), x being our width; its kernels are correlated, ours are
convolved, so they are turned on the way. Pools are convolutions that keep channels apart, and a Scale with one factor per
channel is one of a single tap; two convolutions with strides s1, s2 are one with stride s1 s2, whose taps are spread by
s1. Whether the product of two is exact, at the borders too, is tried out on random numbers; where it is not, the way
becomes a matrix.

Shape letters: O, I channels out and in, X, Y positions, N targets, F sources.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hardware.text import quoted
from neuro.exchange.nir.library import NotInNir, values
from neuro.exchange.nir.synapse_nodes import Grid, ours_at
from neuro.graph import Convolution, GraphError

LARGEST_MATRIX = 2**26  # weights of one layer multiplied out
LINEAR = ("Affine", "Linear", "Scale", "Conv1d", "Conv2d", "Flatten", "SumPool2d", "AvgPool2d", "Identity")
POOLS = ("SumPool2d", "AvgPool2d")
_EXACT = 1e-9  # relative; float64 sums differ by 1e-13 or so

Pair = tuple[int, int]
Shape = tuple[int, ...]
Node = tuple[str, Any]


@dataclass(frozen=True, eq=False)
class Kernel:
    """A correlation as torch's conv2d computes it: weight float64 (O, I / groups, along X, along Y)."""

    weight: np.ndarray
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def depthwise(self) -> bool:
        """Whether each channel goes to one channel of its own."""
        return self.weight.shape[0] == self.groups and self.weight.shape[1] == 1

    def apply(self, x_BIXY: Tensor) -> Tensor:
        """torch's conv2d of it."""
        weight = torch.from_numpy(self.weight)
        return functional.conv2d(x_BIXY, weight, None, self.stride, self.padding, self.dilation, self.groups)


@dataclass(frozen=True, eq=False)
class LinearMap:
    """What a way of linear nodes does, bias apart.

    Attributes:
        weight: float64, (N, F) where `conv` is None, else (O, along W, along H, I / groups), turned as ours are.
        conv: geometry in our order, or None.
        synapses: connections that exist: those of a matrix that are not 0, those of a convolution within its borders.
    """

    weight: np.ndarray
    conv: Convolution | None
    synapses: int


def grid_of(shape: Shape) -> Grid | None:
    """(W, H, C) of a layer whose NIR shape is (C, X, Y) or (C, X); None for a flat one."""
    if len(shape) == 3:
        return shape[1], shape[2], shape[0]
    if len(shape) == 2:
        return shape[1], 1, shape[0]
    return None


def linear_map(nodes: Sequence[Node], shape: Shape, source: Grid | None, target: Grid | None) -> LinearMap:
    """One map of the nodes of a way.

    Args:
        nodes: (name, node) in order, none for a way without any.
        shape: NIR's shape of what enters.
        source, target: (W, H, C) of the layers at the ends where they are kept in our order of (x, y, channel); None for
            those kept in NIR's.

    Raises NotInNir: nodes that do not fit what reaches them, or a matrix beyond `LARGEST_MATRIX`.
    """
    if source is not None and target is not None and grid_of(shape) == source:
        found = _kernel(nodes, shape)
        if found is not None:
            weight = np.ascontiguousarray(found.weight.transpose(0, 2, 3, 1)[:, ::-1, ::-1, :])
            conv = Convolution(source, found.stride, found.padding, found.dilation, found.groups)
            try:
                if conv.output_shape(weight.shape) == target:
                    return LinearMap(weight, conv, count(weight.shape, conv))
            except GraphError:  # what torch takes and we do not
                pass
    matrix = _matrix(nodes, shape)
    if source is not None:
        matrix = _placed(matrix.T, source).T
    if target is not None:
        matrix = _placed(matrix, target)
    return LinearMap(np.ascontiguousarray(matrix), None, int(np.count_nonzero(matrix)))


def count(weight_shape: Shape, conv: Convolution) -> int:
    """Connections of a convolution that lie within its borders."""
    wide, high, channels = conv.output_shape(weight_shape)
    reached = 1
    for axis, outs in enumerate((wide, high)):
        start = np.arange(outs)[:, None] * conv.stride[axis] - conv.padding[axis]
        place = start + np.arange(weight_shape[1 + axis])[None] * conv.dilation[axis]
        reached *= int(((place >= 0) & (place < conv.input_shape[axis])).sum())
    return reached * channels * weight_shape[3]


def through(node: Node, x: Tensor, linear: bool = False) -> Tensor:
    """What a linear node makes of float64 values (B, ...); without its bias where `linear`.

    Raises NotInNir where it does not fit them.
    """
    name, made = node
    kind = type(made).__name__
    try:
        return _through(name, made, kind, x, linear)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        if isinstance(error, NotInNir):
            raise
        raise NotInNir(
            f"node {quoted(name)} ({kind}) does not fit what reaches it, {tuple(x.shape[1:])}: {_first_line(error)}"
        ) from error


def _through(name: str, node: Any, kind: str, x: Tensor, linear: bool) -> Tensor:
    if kind in ("Linear", "Affine"):
        bias = torch.from_numpy(values(node, name, "bias")) if kind == "Affine" and not linear else None
        out = functional.linear(x, torch.from_numpy(values(node, name, "weight")))
        return out if bias is None else out + bias
    if kind == "Scale":
        scale = torch.from_numpy(values(node, name, "scale"))
        out = x * scale
        if out.shape != x.shape:
            raise NotInNir(
                f"node {quoted(name)} (Scale): scale has shape {tuple(scale.shape)}, {tuple(x.shape[1:])} reaches it"
            )
        return out
    if kind == "Identity":
        return x
    if kind == "Flatten":
        start, end = int(node.start_dim), int(node.end_dim)
        return x.flatten(start + 1 if start >= 0 else start, end + 1 if end >= 0 else end)
    kernel = single(name, node, tuple(x.shape[1:]))
    grid = x if x.dim() == 4 else x[..., None]
    grid = _same_padded(node, kernel, grid) if _same(node) else grid
    _fits(name, kind, kernel, tuple(grid.shape[1:]))
    out = kernel.apply(grid)
    if kind in ("Conv1d", "Conv2d") and not linear:
        out = out + torch.from_numpy(_bias(name, node))[:, None, None]
    return out if x.dim() == 4 else out[..., 0]


def single(name: str, node: Any, shape: Shape) -> Kernel:
    """A convolution or pool of NIR as a correlation over what has a shape (C, X, Y), or (C, X) before a Conv1d.

    With padding "same" of an even kernel, which is not the same at both ends, padding is that of the nearer end.
    """
    kind = type(node).__name__
    where = f"node {quoted(name)} ({kind})"
    needed = 2 if kind == "Conv1d" else 3
    if len(shape) != needed:
        form = "(channels, x)" if needed == 2 else "(channels, x, y)"
        raise NotInNir(f"{where} does not fit what reaches it, {shape}: {form} is needed")
    if kind in POOLS:
        size = _pair(node, where, "kernel_size", 1)
        each = 1.0 if kind == "SumPool2d" else 1 / (size[0] * size[1])
        weight = np.full((shape[0], 1, *size), each)
        return Kernel(weight, _pair(node, where, "stride", 1), _pair(node, where, "padding", 0), groups=shape[0])
    weight = values(node, name, "weight")
    if weight.ndim != needed + 1 or not weight.size:
        raise NotInNir(f"{where}: weight has shape {weight.shape}; {needed + 1} axes are needed, none of them empty")
    stride, dilation = _pair(node, where, "stride", 1), _pair(node, where, "dilation", 1)
    groups = _whole(node.groups, f"{where}: groups", 1)
    if kind == "Conv1d":
        weight, stride, dilation = weight[..., None], (stride[0], 1), (dilation[0], 1)
    if isinstance(node.padding, str | bytes):
        word = node.padding.decode() if isinstance(node.padding, bytes) else node.padding
        if word not in ("same", "valid"):
            raise NotInNir(f"{where}: padding is {quoted(word)}; whole numbers, 'same' or 'valid' are known")
        reach = [dilation[axis] * (weight.shape[2 + axis] - 1) for axis in (0, 1)]
        padding = (reach[0] // 2, reach[1] // 2) if word == "same" else (0, 0)
    else:
        padding = _pair(node, where, "padding", 0)
        padding = (padding[0], 0) if kind == "Conv1d" else padding
    return Kernel(weight, stride, padding, dilation, groups)


def _kernel(nodes: Sequence[Node], shape: Shape) -> Kernel | None:
    """One correlation for all nodes of a way, tried out; None where there is none."""
    grid = (*shape, 1) if len(shape) == 2 else shape
    identity = Kernel(np.ones((grid[0], 1, 1, 1)), groups=grid[0])
    found, now = identity, shape
    for at, (name, node) in enumerate(nodes):
        kind = type(node).__name__
        if kind == "Identity":
            continue
        if kind == "Flatten":  # nothing but its target may follow it
            if at + 1 < len(nodes):
                return None
            continue
        if kind in ("Linear", "Affine") or _same(node):
            return None
        if kind == "Scale":
            scale = _per_channel(np.asarray(node.scale, dtype=np.float64), now)
            if scale is None:
                return None
            following = Kernel(scale.reshape(-1, 1, 1, 1), groups=len(scale))
        else:
            following = single(name, node, now)
        product = _product(found, following)
        if product is None:
            return None
        found, now = product, sizes((name, node), now)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, *shape)))
    expected = x
    for made in nodes:
        expected = through(made, expected, linear=True)
    try:
        ours = found.apply(x if len(shape) == 3 else x[..., None]).reshape(2, -1)
    except RuntimeError:
        return None
    expected = expected.reshape(2, -1)
    if ours.shape != expected.shape:
        return None
    off = float((ours - expected).abs().max())
    return found if off <= _EXACT * max(1.0, float(expected.abs().max())) else None


def sizes(node: Node, shape: Shape) -> Shape:
    """Shape behind a node."""
    return tuple(through(node, torch.zeros((1, *shape), dtype=torch.float64)).shape[1:])


def _product(first: Kernel, second: Kernel) -> Kernel | None:
    """`first`, then `second`, as one correlation, borders not looked at; None where it would be huge."""
    if first.depthwise:
        groups = second.groups
        if len(first.weight) != second.weight.shape[1] * groups:
            return None
    elif second.depthwise:
        groups = first.groups
    else:
        first, second, groups = _ungrouped(first), _ungrouped(second), 1
    spread = [first.stride[a] * second.dilation[a] for a in (0, 1)]
    spans = [(first.weight.shape[2 + a], second.weight.shape[2 + a]) for a in (0, 1)]
    step = [math.gcd(first.dilation[a] if spans[a][0] > 1 else 0, spread[a] if spans[a][1] > 1 else 0) or 1 for a in (0, 1)]
    taps = [(spread[a] * (spans[a][1] - 1) + first.dilation[a] * (spans[a][0] - 1)) // step[a] + 1 for a in (0, 1)]
    weight = np.zeros((len(second.weight), first.weight.shape[1] if not first.depthwise else second.weight.shape[1], *taps))
    if weight.size > LARGEST_MATRIX:
        return None
    per_group = second.weight.shape[1]
    for j in np.ndindex(spans[0][1], spans[1][1]):
        for i in np.ndindex(spans[0][0], spans[1][0]):
            at = [(spread[a] * j[a] + first.dilation[a] * i[a]) // step[a] for a in (0, 1)]
            one, two = first.weight[:, :, i[0], i[1]], second.weight[:, :, j[0], j[1]]
            if first.depthwise:
                group = np.arange(len(two)) // (len(two) // groups)
                channel = group[:, None] * per_group + np.arange(per_group)
                weight[:, :, at[0], at[1]] += two * one[channel, 0]
            elif second.depthwise:
                weight[:, :, at[0], at[1]] += two * one
            else:
                weight[:, :, at[0], at[1]] += two @ one
    return Kernel(
        weight,
        (first.stride[0] * second.stride[0], first.stride[1] * second.stride[1]),
        (
            first.stride[0] * second.padding[0] + first.padding[0],
            first.stride[1] * second.padding[1] + first.padding[1],
        ),
        (step[0], step[1]),
        groups,
    )


def _ungrouped(kernel: Kernel) -> Kernel:
    if kernel.groups == 1:
        return kernel
    outs, per_group = kernel.weight.shape[:2]
    whole = np.zeros((outs, per_group * kernel.groups, *kernel.weight.shape[2:]))
    for out in range(outs):
        start = out // (outs // kernel.groups) * per_group
        whole[out, start : start + per_group] = kernel.weight[out]
    return Kernel(whole, kernel.stride, kernel.padding, kernel.dilation)


def _per_channel(scale: np.ndarray, shape: Shape) -> np.ndarray | None:
    """One factor per channel of a Scale; None where it differs within a channel."""
    try:
        whole = np.broadcast_to(scale, shape)
    except ValueError:
        return None
    flat = whole.reshape(shape[0], -1)
    return np.array(flat[:, 0]) if np.all(flat == flat[:, :1]) else None


def _matrix(nodes: Sequence[Node], shape: Shape) -> np.ndarray:
    """(N, F) float64 in NIR's order, by sending unit vectors through the nodes in blocks."""
    size = math.prod(shape)
    out = shape
    for node in nodes:
        out = sizes(node, out)
        if math.prod(out) * size > LARGEST_MATRIX:
            raise NotInNir(
                f"node {quoted(node[0])}: the layer as a matrix has {math.prod(out) * size:,} weights; {LARGEST_MATRIX:,}"
                " are the limit. Put neurons between its parts"
            )
    found = np.empty((size, math.prod(out)))
    block = max(1, 2**22 // max(size, math.prod(out)))
    for start in range(0, size, block):
        stop = min(size, start + block)
        x = torch.zeros(stop - start, size, dtype=torch.float64)
        x[torch.arange(stop - start), torch.arange(start, stop)] = 1
        x = x.reshape(-1, *shape)
        for node in nodes:
            x = through(node, x, linear=True)
        found[start:stop] = x.reshape(stop - start, -1).numpy()
    return found.T


def _placed(rows: np.ndarray, grid: Grid) -> np.ndarray:
    """Rows in NIR's order of a grid as rows in ours."""
    found = np.empty_like(rows)
    found[ours_at(grid)] = rows
    return found


def _same(node: Any) -> bool:
    """Whether padding is "same" and not the same at both ends."""
    padding = getattr(node, "padding", None)
    if not isinstance(padding, str | bytes) or padding not in ("same", b"same"):
        return False
    dilation = np.broadcast_to(np.asarray(node.dilation).reshape(-1), (len(node.weight.shape) - 2,))
    return bool(np.any(dilation * (np.array(node.weight.shape[2:]) - 1) % 2))


def _same_padded(node: Any, kernel: Kernel, x: Tensor) -> Tensor:
    """One more column or row at the far end, as torch pads an even kernel with padding "same"."""
    more = [kernel.dilation[a] * (kernel.weight.shape[2 + a] - 1) % 2 for a in (0, 1)]
    return functional.pad(x, (0, more[1], 0, more[0]))


def _bias(name: str, node: Any) -> np.ndarray:
    bias = values(node, name, "bias").reshape(-1)
    if len(bias) != len(node.weight):
        raise NotInNir(
            f"node {quoted(name)} ({type(node).__name__}): bias has {len(bias)} values, {len(node.weight)} channels"
        )
    return bias


def _fits(name: str, kind: str, kernel: Kernel, shape: Shape) -> None:
    """Refuses a kernel larger than its padded input by name, and channels that are not its own."""
    where = f"node {quoted(name)} ({kind})"
    needed = kernel.weight.shape[1] * kernel.groups
    if shape[0] != needed or kernel.weight.shape[0] % kernel.groups:
        raise NotInNir(
            f"{where} does not fit what reaches it, {shape}: its weight {kernel.weight.shape} in {kernel.groups} groups"
            f" takes {needed} channels"
        )
    for axis in (0, 1):
        reach = kernel.dilation[axis] * (kernel.weight.shape[2 + axis] - 1) + 1
        room = shape[1 + axis] + 2 * kernel.padding[axis]
        if reach > room:
            raise NotInNir(
                f"{where}: its kernel reaches over {reach} positions of axis {axis}, and its padded input has {room}."
                " Check the Input's shape, which is (channels, x, y), and the padding"
            )


def _pair(node: Any, where: str, key: str, low: int) -> Pair:
    given = getattr(node, key)
    numbers = np.asarray(given).reshape(-1)
    if numbers.size not in (1, 2):
        raise NotInNir(f"{where}: {key} is {quoted(given)}; one or two whole numbers are needed")
    return _whole(numbers[0], f"{where}: {key}", low), _whole(numbers[-1], f"{where}: {key}", low)


def _whole(value: Any, what: str, low: int) -> int:
    try:
        number = float(np.asarray(value).reshape(()))
    except (TypeError, ValueError):
        raise NotInNir(f"{what} is {quoted(value)}; a whole number from {low} is needed") from None
    if not math.isfinite(number) or number != int(number) or number < low:
        raise NotInNir(f"{what} is {number:g}; a whole number from {low} is needed")
    return int(number)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
