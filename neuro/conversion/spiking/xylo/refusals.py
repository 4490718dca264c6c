"""What of a description Xylo has no counterpart of: its pools first, then resets, ways between layers, and inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from hardware.chips.pooled import PooledChip
from hardware.placement.pooled import RESOURCES, PooledDemand, place_pooled
from hardware.text import quoted
from neuro.conversion.spiking.description import INPUT, Description, NotConvertible, Synapses, flat_input, weighted
from neuro.graph.xylo import MOST_SPIKES


def must_be_hidden(description: Description) -> tuple[str, ...]:
    """Outputs that cannot be read-outs themselves: they feed a layer or themselves, or the input reaches them."""
    feeding = {item.source for item in description.synapses}
    entered = {item.target for item in description.synapses if item.source == INPUT}
    return tuple(name for name in description.outputs if name in feeding or name in entered)


def check_pools(description: Description, chip: PooledChip) -> None:
    """The pools by their sizes alone; hardware.placement.DoesNotFit where one is too small for the network."""
    hidden, outputs = must_be_hidden(description), description.outputs
    used = dict.fromkeys(RESOURCES, 0) | {
        "inputs": math.prod(description.input_shape),
        "hidden": sum(x.size for x in description.neurons if x.name not in outputs or x.name in hidden),
        "readouts": sum(layer.size for layer in description.neurons if layer.name in outputs),
    }
    place_pooled(PooledDemand("the network", used, {}), chip)


def check_layers(description: Description) -> None:
    """NotConvertible names the first layer or way that Xylo has no counterpart of, with the remedy."""
    depths = description.depths()
    for layer in description.neurons:
        if layer.sums:
            raise NotConvertible(
                f"{layer.name}: it sends sums, and Xylo's neurons send spikes. Describe the network with its pools folded"
                " into the kernels behind them (pools='fold')"
            )
        if layer.reset == "zero":
            raise NotConvertible(
                f"{layer.name}: its v goes to 0 with a spike, and Xylo's neurons take the threshold off. Train with"
                " reset_mechanism='subtract' (of a NIR file that was trained so: reset='subtract', --reset subtract)"
            )
        if layer.reset == "none" and not layer.is_readout:
            raise NotConvertible(
                f"{layer.name}: it has a threshold and no reset, and Xylo takes the threshold off at every spike. Train"
                " with reset_mechanism='subtract', or make it a read-out (readout=True)"
            )
        if layer.is_readout and layer.name not in description.outputs:
            raise NotConvertible(f"{layer.name}: it never spikes and is no output; give it a threshold, or leave it out")
        if np.any(layer.alpha > 1 - 1e-9):
            raise NotConvertible(
                f"{layer.name}: its current never decays (alpha 1), and Xylo's loses at least 1 at every step. Train with"
                " alpha below 1"
            )
        if layer.is_readout and any(item.source == INPUT or item.recurrent for item in description.incoming(layer.name)):
            raise NotConvertible(
                f"{layer.name}: its value is the result, and the input or it itself feeds it; on Xylo hidden neurons alone"
                " feed read-outs. Put a layer of neurons in between"
            )
    for item in description.synapses:
        if not item.recurrent and depths[item.target] - depths[item.source] > 1:
            over = depths[item.target] - depths[item.source] - 1
            raise NotConvertible(
                f"synapses {quoted(item.name)}: they pass over {over} layers, whose spikes arrive a step later each, and"
                " Xylo has no delays. Leave the way out, or lead it through the layers"
            )


def matrix_of(item: Synapses) -> np.ndarray:
    """Weights (N, S) of synapses; of a convolution those of its places."""
    if item.conv is None:
        return np.asarray(item.weight)
    return weighted(item, torch.eye(item.ends[1], dtype=torch.float64)[None])[0].T.numpy()


def messages(x_BTF: Tensor, shape: tuple[int, ...], input_scale: float) -> Tensor:
    """Float input as spikes per channel and step, int32 (B, T, F).

    Raises NotConvertible where a value is no whole number of units, below 0, or more than 15.
    """
    units = flat_input(x_BTF, shape).double() / input_scale
    whole, most = torch.round(units), MOST_SPIKES["input"]
    if bool(((units - whole).abs() > 1e-3).any()) or bool((whole < 0).any()) or bool((whole > most).any()):
        reach = f"{float(x_BTF.min()):g}..{float(x_BTF.max()):g}"
        raise NotConvertible(
            f"an input channel of Xylo takes 0..{most} spikes a step, of {input_scale:g} each here; the inputs reach over"
            f" {reach}. Round them, spread them over more steps, or give another input_scale"
        )
    return whole.to(torch.int32)


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """NotConvertible where an argument is none of its choices."""
    known = tuple(choices)
    if isinstance(value, bool) or value not in known:
        raise NotConvertible(f"{name} is {quoted(value)}; it is one of {', '.join(map(str, known))}")
