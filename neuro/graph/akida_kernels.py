"""Convolutions of a graph in the forms that Akida 2.0 has: a square odd kernel, stride 1 or 2, two paddings of their own.

A graph's convolution may have any kernel, padding, dilation and groups. Its taps are written into the smallest of Akida's
kernels that reaches all of them with one of Akida's paddings; where none does, it is refused with what was tried.

Needs numpy only.
"""

from __future__ import annotations

import math

import numpy as np

from neuro.graph.kinds import GraphError
from neuro.graph.synapses import Projection
from neuro.graph.text import quoted

KERNELS = (1, 3, 5, 7)


def kernel_layer(
    p: Projection, whole: np.ndarray, given: tuple[int, int, int]
) -> tuple[str, np.ndarray, int, str, tuple[int, int, int]]:
    """Kind, weight as Akida holds it, stride, padding, and the shape of what comes out."""
    if p.conv is None:
        return "dense", whole.T, 1, "valid", (1, 1, len(whole))
    conv, where = p.conv, f"projection {quoted(p.name)} (conv)"
    if conv.input_shape != given:
        raise GraphError(f"{where}: it reads {conv.input_shape}, and the layer before it sends {given}")
    if conv.stride[0] != conv.stride[1] or conv.stride[0] > 2:
        raise GraphError(f"{where}: its stride is {conv.stride}; Akida has 1 and 2, alike along both axes")
    stride, shape = conv.stride[0], conv.output_shape(p.weight.shape)
    taps = [
        [step * conv.dilation[axis] - conv.padding[axis] for step in range(p.weight.shape[1 + axis])] for axis in (0, 1)
    ]
    for size in KERNELS if stride == 1 else KERNELS[:2]:
        for padding in ("same", "same_upper", "valid"):
            before = [padded(padding, given[axis], size, stride) for axis in (0, 1)]
            if any(before[axis][1] != shape[axis] for axis in (0, 1)):
                continue
            places = [[tap + before[axis][0] for tap in taps[axis]] for axis in (0, 1)]
            if all(0 <= place < size for axis in places for place in axis):
                return _written(p, whole, size, places, stride, padding, shape)
    kernel = p.weight.shape[1:3]
    raise GraphError(
        f"{where}: a kernel of {kernel[0]} x {kernel[1]} with stride {stride}, padding {conv.padding} and dilation"
        f" {conv.dilation} on {given[0]} x {given[1]} fits none of Akida's: {', '.join(f'{k} x {k}' for k in KERNELS)}"
        " (stride 2: 1 x 1 and 3 x 3), with padding valid or same. Use an odd kernel with padding k // 2"
    )


def padded(padding: str, extent: int, kernel: int, stride: int) -> tuple[int, int]:
    """Along one axis: how many places are added before, and how many come out."""
    if padding == "valid":
        return 0, (extent - kernel) // stride + 1
    out = math.ceil(extent / stride)
    total = max((out - 1) * stride + kernel - extent, 0)
    return (total + 1) // 2 if padding == "same_upper" else total // 2, out


def _written(
    p: Projection, whole: np.ndarray, size: int, places: list[list[int]], stride: int, padding: str,
    shape: tuple[int, int, int],
) -> tuple[str, np.ndarray, int, str, tuple[int, int, int]]:  # fmt: skip
    """The kernel in its square, flipped as a graph's is: (O, kw, kh, I / groups) to (K, K, I, O)."""
    assert p.conv is not None
    channels, groups = p.conv.input_shape[2], p.conv.groups
    flipped = whole[:, ::-1, ::-1]  # tap 0 first
    outs, per_group = len(whole), channels // groups
    depthwise = groups == channels == outs and size > 1
    kernel = np.zeros((size, size, 1 if depthwise else channels, outs), dtype=np.int64)
    for x, place_x in enumerate(places[0]):
        for y, place_y in enumerate(places[1]):
            for out in range(outs):
                first = 0 if depthwise else out // (outs // groups) * per_group
                kernel[place_x, place_y, first : first + per_group, out] = flipped[out, x, y]
    kernel = kernel[::-1, ::-1]
    if depthwise:
        return "depthwise", kernel.transpose(0, 1, 3, 2), stride, padding, shape
    return "conv", kernel, stride, padding, shape
