"""torch's convolutions and poolings in the order of a graph: (width, height, channel), kernels flipped, padding even.

torch correlates pictures (channel, row, column) with kernels (out, in / groups, kernel rows, kernel columns); a graph's
`conv` is a true convolution over (width, height, channel), with as much padding before as behind. A line (channel,
position) is a picture of one row. Shape letters: C channels, H rows, W columns; O, I channels out and in; N samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from neuro.graph.synapses import Convolution

Layer = nn.Linear | nn.Conv1d | nn.Conv2d


@dataclass(frozen=True)
class Pool:
    """Sums over windows, (rows, columns) each; what is padded counts as 0. `divisor`: what the mean divides them by."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    divisor: int


def picture(shape: Sequence[int]) -> tuple[int, int, int]:
    """(C, H, W) of a sample's shape: (C, H, W), a line (C, W), or features (C,)."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return (shape[0], 1, shape[1]) if len(shape) == 2 else (shape[0], 1, 1)


def box(shape: Sequence[int]) -> tuple[int, int, int]:
    """(W, H, C) of a sample's shape in torch's order."""
    channels, rows, columns = picture(shape)
    return columns, rows, channels


def order(shape: Sequence[int]) -> np.ndarray:
    """Where the value of each neuron stands in torch's flattened sample, int64 (neurons,)."""
    return np.arange(math.prod(shape)).reshape(picture(shape)).transpose(2, 1, 0).reshape(-1)


def to_neurons(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Samples (N, ...) in torch's order, with `shape` each, as neurons (N, W x H x C)."""
    return x.reshape(len(x), *picture(shape)).permute(0, 3, 2, 1).reshape(len(x), -1)


def to_torch(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Neurons (N, W x H x C) as samples (N, *shape) in torch's order."""
    return value.reshape(len(value), *box(shape)).permute(0, 3, 2, 1).reshape(len(value), *shape).contiguous()


def output_shape(layer: Layer, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of a sample behind a layer, in torch's order."""
    if isinstance(layer, nn.Linear):
        return (layer.out_features,)
    given = torch.empty(1, *shape, device="meta", dtype=layer.weight.dtype)
    weight = torch.empty_like(layer.weight, device="meta")
    function = nn.functional.conv1d if isinstance(layer, nn.Conv1d) else nn.functional.conv2d
    out = function(given, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return tuple(out.shape[1:])


def macs_of(layer: Layer, shape: Sequence[int]) -> int:
    """Dense multiply-accumulates of a sample, as torch's counter counts them: padding included."""
    if isinstance(layer, nn.Linear):
        return layer.in_features * layer.out_features
    return math.prod(output_shape(layer, shape)) * math.prod(layer.weight.shape[1:])


def in_graph_order(layer: nn.Conv1d | nn.Conv2d, weight: Tensor, shape: Sequence[int]) -> tuple[Tensor, Convolution]:
    """A layer's weights (or whole numbers in their place) as the graph's kernel, and its geometry.

    Args:
        layer: its stride, padding (numbers, "same", "valid"), dilation and groups are read.
        weight: as `layer.weight`.
        shape: of a sample that comes in, (C, H, W) or (C, W).

    Returns:
        kernel (O, kernel width, kernel height, I / groups), with zeros where only those make the padding even, and the
        geometry for it.
    """
    if weight.dim() == 3:
        weight = weight[:, :, None, :]

    def both(value: Sequence[int], other: int) -> tuple[int, int]:
        return (other, value[0]) if len(value) == 1 else (value[0], value[1])

    stride, dilation = both(layer.stride, 1), both(layer.dilation, 1)
    if layer.padding == "valid":
        padding = (0, 0)
    elif isinstance(layer.padding, str):  # "same": torch pads the odd one behind
        padding, weight, dilation = _same(weight, dilation)
    else:
        padding = both(layer.padding, 0)
    kernel = weight.flip(2, 3).permute(0, 3, 2, 1).contiguous()
    geometry = Convolution(
        box(shape),
        stride=(stride[1], stride[0]),
        padding=(padding[1], padding[0]),
        dilation=(dilation[1], dilation[0]),
        groups=layer.groups,
    )
    return kernel, geometry


def _same(weight: Tensor, dilation: tuple[int, int]) -> tuple[tuple[int, int], Tensor, tuple[int, int]]:
    padding, dilations = [], []
    for axis, step in zip((2, 3), dilation, strict=True):
        taps = weight.shape[axis]
        total = step * (taps - 1)
        if total % 2:  # as a kernel of one tap more before, whose taps are all there
            size = list(weight.shape)
            size[axis] = total + 2
            longer = weight.new_zeros(size)
            longer.index_copy_(axis, torch.arange(taps, device=weight.device) * step + 1, weight)
            weight, total, step = longer, total + 1, 1
        padding.append(total // 2)
        dilations.append(step)
    return (padding[0], padding[1]), weight, (dilations[0], dilations[1])


def window(pool: Pool, shape: Sequence[int]) -> tuple[np.ndarray, Convolution]:
    """Sums over windows as the graph's kernel of ones, one channel at a time: int32 (C, columns, rows, 1), geometry."""
    channels = picture(shape)[0]
    kernel = np.ones((channels, pool.kernel[1], pool.kernel[0], 1), dtype=np.int32)
    geometry = Convolution(box(shape), stride=pool.stride[::-1], padding=pool.padding[::-1], groups=channels)
    return kernel, geometry


def pooled(pool: Pool, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of a sample behind the windows."""
    kernel, geometry = window(pool, shape)
    width, height, channels = geometry.output_shape(kernel.shape)
    return (channels, height, width) if len(shape) == 3 else (channels, width)
