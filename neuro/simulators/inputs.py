"""Inputs at the door of every simulator: names, shapes, types and widths checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hardware.text import listed, quoted
from neuro.graph import GraphError, SpikingGraph
from neuro.graph.kinds import XYLO_KINDS
from neuro.graph.values import integer_array, is_array
from neuro.graph.xylo import MOST_SPIKES
from neuro.simulators.memory import edges

Integers = Tensor | np.ndarray | Sequence[Any]
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # types that torch has hardly any arithmetic for


class InputError(ValueError):
    """Inputs that do not fit the graph: a name, a shape, a type, or a payload too wide."""


def checked_inputs(
    graph: SpikingGraph, inputs: Mapping[str, Integers], device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """Inputs as tensors of shape (batch, steps, size) in the graph's order, every rule of `simulate` checked.

    Args:
        graph: names the inputs and their sizes.
        inputs: integers or truth values as tensors, numpy arrays or nested lists, one per input population.
        device: where the tensors are to lie.

    Raises:
        InputError: missing, unknown, not integer, of a wrong shape, or too wide for a projection they feed.
    """
    return _checked(graph, inputs, device)[0]


def _checked(
    graph: SpikingGraph, inputs: Mapping[str, Integers], device: torch.device | str | None
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Inputs as of `checked_inputs`, and the largest magnitude of each."""
    if not graph.inputs:
        raise InputError(
            "the graph has no input population, so nothing says how many steps to run; give simulate steps=, or add one"
        )
    for given, needed, word in ((inputs, graph.inputs, "unknown"), (graph.inputs, inputs, "missing")):
        for name in given:
            if name not in needed:
                raise InputError(f"input {quoted(name)} is {word}; the graph's inputs are: {listed(graph.inputs)}")
    values: dict[str, Tensor] = {}
    bounds: dict[str, int] = {}
    extent: tuple[int, int] | None = None
    for name in graph.inputs:
        value = _tensor(name, inputs[name])
        size = graph.population(name).size
        if value.ndim != 3 or value.shape[2] != size or 0 in value.shape:
            raise InputError(f"input {quoted(name)} has shape {tuple(value.shape)}; (batch, steps, {size}) is needed")
        if extent is not None and extent != tuple(value.shape[:2]):
            raise InputError(
                f"input {quoted(name)} has (batch, steps) = {tuple(value.shape[:2])}, another input has {extent}"
            )
        extent = (value.shape[0], value.shape[1])
        if value.dtype == torch.bool:
            value = value.to(torch.int8)
        least, most = edges(value)
        for projection in graph.outgoing(name):
            low, high = projection.payload_range
            holder = f"projection {quoted(projection.name)} ({projection.num_message_bits} bits)"
            _refuse_wide(name, value, (least, most), low, high, holder)
        if any(graph.population(p.target).kind in XYLO_KINDS for p in graph.outgoing(name)):
            _refuse_wide(name, value, (least, most), 0, MOST_SPIKES["input"], "an input channel of Xylo (spikes a step)")
        if not graph.outgoing(name):
            _refuse_wide(name, value, (least, most), -(2**31), 2**31 - 1, "a message (32 bits)")
        values[name] = value.to(device) if device is not None else value
        bounds[name] = max(-least, most)
    return values, bounds


def checked_run(
    graph: SpikingGraph,
    inputs: Mapping[str, Integers],
    steps: int | None,
    device: torch.device | str | None = None,
) -> tuple[dict[str, Tensor], int, int]:
    """Inputs as of `checked_inputs`, batch and steps of a run; a graph without input populations is one sample of `steps`.

    Raises:
        InputError: as `checked_inputs`; `steps` missing where nothing else says it, given where the inputs do, or no whole
            number from 1.
    """
    values, _, batch, length = bounded_run(graph, inputs, steps, device)
    return values, batch, length


def bounded_run(
    graph: SpikingGraph,
    inputs: Mapping[str, Integers],
    steps: int | None,
    device: torch.device | str | None = None,
) -> tuple[dict[str, Tensor], dict[str, int], int, int]:
    """As `checked_run`, with the largest magnitude of each input behind the inputs. Raises as it does."""
    if graph.inputs and steps is not None:
        raise InputError(
            f"steps is {quoted(steps)}, but the graph has inputs, whose length says how many there are; leave it"
        )
    if graph.inputs or steps is None:
        values, bounds = _checked(graph, inputs, device)
        batch, length = next(iter(values.values())).shape[:2]
        return values, bounds, int(batch), int(length)
    if inputs:
        raise InputError(f"input {quoted(next(iter(inputs)))} is unknown; the graph has no input population")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise InputError(f"steps is {quoted(steps)}; a whole number from 1 is needed")
    return {}, {}, 1, steps


def _tensor(name: str, raw: Integers) -> Tensor:
    """Integers or truth values as a tensor of a signed type, or of bool."""
    where = f"input {quoted(name)}"
    if isinstance(raw, Tensor):
        if raw.is_floating_point() or raw.is_complex() or raw.is_quantized:
            raise InputError(f"{where} is {raw.dtype}; messages are integers, so round and convert it first")
        if raw.dtype not in _UNSIGNED:
            return raw
        raw = raw.cpu().numpy()
    if isinstance(raw, np.ndarray) and not (np.issubdtype(raw.dtype, np.integer) or raw.dtype == np.bool_):
        raise InputError(f"{where} is {raw.dtype}; messages are integers, so round and convert it first")
    if isinstance(raw, np.ndarray) and raw.dtype == np.bool_:
        return torch.from_numpy(raw.astype(np.int8))
    if not is_array(raw):
        raise InputError(f"{where} is {quoted(raw)}; an array of integers (batch, steps, size) is needed")
    try:
        array = integer_array(raw, where)
    except GraphError as error:
        raise InputError(str(error)) from error
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        if array.size and int(array.max()) > 2**31 - 1:
            raise InputError(f"{where} holds {int(array.max())}; a message holds up to {2**31 - 1}")
        array = array.astype(np.int64)
    return torch.from_numpy(np.array(array))


def _refuse_wide(name: str, value: Tensor, edges: tuple[int, int], low: int, high: int, holder: str) -> None:
    if edges[0] < low or edges[1] > high:
        sample, step, neuron = torch.nonzero((value < low) | (value > high))[0].tolist()
        raise InputError(
            f"input {quoted(name)} is {int(value[sample, step, neuron])} at sample {sample}, step {step}, neuron {neuron};"
            f" {holder} carries {low}..{high}"
        )
