"""Weights of projections as NIR says them: matrices, and convolutions where source and target keep a grid.

Our grids run over (width, height, channel), NIR's over (channel, x, y), x being our width; our kernels are flipped, as a
convolution's are, and NIR's are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from neuro.exchange.nir.library import nir_library
from neuro.graph import Population, Projection, SpikingGraph

Grid = tuple[int, int, int]


def grids(graph: SpikingGraph) -> dict[str, Grid]:
    """(W, H, C) of the populations that keep a grid in NIR: what feeds them, or what they feed if inputs, is convolutions.

    NIR can flatten and cannot unflatten, so a convolution from or to a flat population becomes a matrix.
    """
    found: dict[str, Grid] = {}
    for p in graph.populations:
        ways = graph.outgoing(p.name) if p.kind == "input" else graph.incoming(p.name)
        shapes = {
            None if w.conv is None else w.conv.input_shape if p.kind == "input" else w.conv.output_shape(w.weight.shape)
            for w in ways
        }
        if len(shapes) == 1 and None not in shapes:
            found[p.name] = next(iter(shapes))  # type: ignore[assignment]
    while True:
        flat = {p.target for p in graph.projections if p.target in found and not keeps_grid(p, found)}
        if not flat:
            return found
        for name in flat:
            del found[name]


def keeps_grid(projection: Projection, found: Mapping[str, Grid]) -> bool:
    """Whether a projection can be a Conv2d node: its ends keep their grids, and NIR gives it the right shapes."""
    conv = projection.conv
    if conv is None or found.get(projection.source) != conv.input_shape:
        return False
    if found.get(projection.target) != conv.output_shape(projection.weight.shape) or conv.groups != 1:
        return False
    node = conv_node(projection, 1.0, None)
    wide, high, channels = found[projection.target]
    # nir 1.0.8 reckons with a square kernel whatever the kernel
    return tuple(node.output_type["output"]) == (channels, wide, high)


def node_shape(population: Population, found: Mapping[str, Grid]) -> tuple[int, ...]:
    """Shape of a population's parameters in NIR: (size,), or (C, W, H) where it keeps a grid."""
    if population.name not in found:
        return (population.size,)
    wide, high, channels = found[population.name]
    return channels, wide, high


def ours_at(grid: Grid) -> np.ndarray:
    """Our number of the neuron at each of NIR's places, flattened: int64 (size,)."""
    wide, high, channels = grid
    return np.arange(wide * high * channels).reshape(wide, high, channels).transpose(2, 0, 1).reshape(-1)


def conv_node(projection: Projection, scale: float, bias_O: np.ndarray | None) -> Any:
    """nir.Conv2d: weights x scale, and a bias per channel (None: zeros)."""
    conv = projection.conv
    assert conv is not None
    weight = projection.weight[:, ::-1, ::-1, :].transpose(0, 3, 1, 2).astype(np.float64) * scale
    return nir_library().Conv2d(
        input_shape=conv.input_shape[:2],
        weight=np.ascontiguousarray(weight),
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=1,
        bias=np.zeros(len(weight)) if bias_O is None else bias_O,
    )


def matrix(projection: Projection, delay: int, source_grid: Grid | None) -> np.ndarray:
    """Weights of one delay as float64 (n_target, n_source in NIR's order)."""
    weight = projection.weight
    if projection.conv is not None:
        weight = unrolled(projection)
    elif projection.delays is not None:
        weight = np.where(projection.delays == delay, weight, 0)
    return (weight if source_grid is None else weight[:, ours_at(source_grid)]).astype(np.float64)


def unrolled(projection: Projection) -> np.ndarray:
    """A convolution as a matrix, integers (n_target, n_source)."""
    assert projection.conv is not None
    patches = projection.conv.patches(projection.weight.shape)  # (P, G, K), -1 in the padding
    positions, groups, taps = patches.shape
    channels = len(projection.weight)
    flat = projection.weight.reshape(1, groups, channels // groups, taps)
    source = np.broadcast_to(patches[:, :, None, :], (positions, groups, channels // groups, taps))
    target = np.arange(positions * channels).reshape(positions, groups, channels // groups, 1)
    there = source >= 0
    found = np.zeros(projection.ends, dtype=np.int64)
    np.add.at(
        found, (np.broadcast_to(target, source.shape)[there], source[there]), np.broadcast_to(flat, source.shape)[there]
    )
    return found
