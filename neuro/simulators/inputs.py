"""Inputs at the door of every simulator: names, shapes, types and widths checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from neuro.graph import SpikingGraph


class InputError(ValueError):
    """Inputs that do not fit the graph: a name, a shape, a type, or a payload too wide."""


def checked_inputs(
    graph: SpikingGraph, inputs: Mapping[str, Tensor | np.ndarray], device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """Inputs as tensors of shape (batch, steps, size) in the graph's order, every rule of `simulate` checked.

    Raises:
        InputError: missing, unknown, not integer, of a wrong shape, or too wide for a projection they feed.
    """
    if not graph.inputs:
        raise InputError("the graph has no input population, so nothing says how many steps to run; add one")
    for given, needed, word in ((inputs, graph.inputs, "unknown"), (graph.inputs, inputs, "missing")):
        for name in given:
            if name not in needed:
                raise InputError(f"input {name!r} is {word}; the graph's inputs are: {', '.join(graph.inputs)}")
    values: dict[str, Tensor] = {}
    extent: tuple[int, int] | None = None
    for name in graph.inputs:
        raw = inputs[name]
        value = raw if isinstance(raw, Tensor) else torch.from_numpy(np.array(raw))
        if value.is_floating_point() or value.is_complex():
            raise InputError(f"input {name!r} is {value.dtype}; messages are integers, so round and convert it first")
        size = graph.population(name).size
        if value.ndim != 3 or value.shape[2] != size or 0 in value.shape:
            raise InputError(f"input {name!r} has shape {tuple(value.shape)}; (batch, steps, {size}) is needed")
        if extent is not None and extent != tuple(value.shape[:2]):
            raise InputError(f"input {name!r} has (batch, steps) = {tuple(value.shape[:2])}, another input has {extent}")
        extent = (value.shape[0], value.shape[1])
        if value.dtype == torch.bool:
            value = value.to(torch.int8)
        least, most = (int(edge) for edge in torch.aminmax(value))
        for projection in graph.outgoing(name):
            low, high = projection.payload_range
            holder = f"projection {projection.name!r} ({projection.num_message_bits} bits)"
            _refuse_wide(name, value, (least, most), low, high, holder)
        if not graph.outgoing(name):
            _refuse_wide(name, value, (least, most), -(2**31), 2**31 - 1, "a message (32 bits)")
        values[name] = value.to(device) if device is not None else value
    return values


def _refuse_wide(name: str, value: Tensor, edges: tuple[int, int], low: int, high: int, holder: str) -> None:
    if edges[0] < low or edges[1] > high:
        sample, step, neuron = torch.nonzero((value < low) | (value > high))[0].tolist()
        raise InputError(
            f"input {name!r} is {int(value[sample, step, neuron])} at sample {sample}, step {step}, neuron {neuron};"
            f" {holder} carries {low}..{high}"
        )
