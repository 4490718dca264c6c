"""Samples of a graph and inferences of Akida side by side: which step is which, constants, and what 8-bit messages hold.

A graph takes one sample a step and sends it on from population to population, a step each; Akida knows inferences only.
So ours runs with its constants ahead of the samples and with empty steps behind them, and of each population the steps
count in which the samples arrive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hardware.text import quoted
from neuro.graph import SpikingGraph
from neuro.graph.akida import MESSAGE_HIGH, MESSAGE_LOW, AkidaLayer, AkidaNetwork
from neuro.simulators.activity import Activity
from neuro.simulators.fixed_point import simulate
from neuro.simulators.inputs import InputError


def with_constants(network: AkidaNetwork, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs with the network's constants in their places; used for samples that are made up."""
    found = {name: value.clone() for name, value in values.items()}
    if len(network.lines):
        found[network.input][..., -len(network.lines) :] = torch.from_numpy(network.lines).to(found[network.input].dtype)
    for name, payloads in network.constants.items():
        found[name] = torch.from_numpy(payloads).to(found[name].dtype).expand_as(found[name]).clone()
    return found


def samples_of(network: AkidaNetwork, values: Mapping[str, Tensor]) -> np.ndarray:
    """What Akida gets: int8 (batch, steps, width x height x channels).

    Args:
        values: integers (batch, steps, size) of every input population.

    Raises:
        InputError: constants that are others than the graph's, or a payload beyond 8 bits; by place, with the remedy.
    """
    main = values[network.input]
    size = main.shape[2] - len(network.lines)
    for name, held, payloads in (
        (network.input, main[..., size:], network.lines),
        *((name, values[name], payloads) for name, payloads in network.constants.items()),
    ):
        wrong = held.cpu().numpy() != payloads
        if wrong.any():
            sample, step, line = (int(i) for i in np.argwhere(wrong)[0])
            neuron = line + (size if name == network.input else 0)
            raise InputError(
                f"input {quoted(name)} is {int(held[sample, step, line])} at sample {sample}, step {step}, neuron {neuron},"
                f" which holds the constant {int(payloads[line])} of the network's biases: Akida has them as biases of its"
                " layers, so give the constant at every step"
            )
    found = main[..., :size].cpu().numpy()
    _refuse_beyond(network.input, found, MESSAGE_LOW, MESSAGE_HIGH, "Akida's inputs have 8 bits", "Scale the input down")
    return np.asarray(found.astype(np.int8))


def ours(graph: SpikingGraph, network: AkidaNetwork, values: Mapping[str, Tensor]) -> Activity:
    """Our simulation of the samples: messages of each layer's population, int32 (batch, samples, size).

    Raises:
        InputError: messages that a layer of Akida does not hold, which would saturate there; by place, with the remedy.
    """
    before, after = network.warm_up, network.layers[-1].depth
    longer = {}
    for name, value in values.items():
        first, last = torch.zeros_like(value[:, :1]), torch.zeros_like(value[:, :1])
        longer[name] = torch.cat([first.repeat(1, before, 1), value, last.repeat(1, after, 1)], dim=1)
    longer = with_constants(network, longer)
    found = simulate(graph, longer, record=("spikes",))
    steps = next(iter(values.values())).shape[1]
    spikes = {}
    for place, layer in enumerate(network.layers):
        start = before + layer.depth
        sent = found.spikes[layer.name][:, start : start + steps].to(torch.int32)
        spikes[layer.name] = sent
        if not layer.last:
            following = network.layers[place + 1]
            _refuse_beyond(layer.name, sent.cpu().numpy(), layer.low, layer.high, _holds(layer), _remedy(layer, following))
    return replace(found, spikes=spikes, states={}, steps=steps)


def _holds(layer: AkidaLayer) -> str:
    bits = "4 bits without a sign behind 4-bit weights" if layer.weight_bits == 4 else "8 bits"
    return f"a layer of Akida sends {bits}"


def _remedy(layer: AkidaLayer, following: AkidaLayer) -> str:
    if following.kind == "depthwise" and len(set(following.weight.reshape(-1).tolist()) - {0}) == 1:
        return "A pooling of whole sums stands behind it; use a convolution with a stride in its place"
    bits = 4 if layer.weight_bits == 4 else 7
    return f"Convert with GradedConfig(hidden_bits={bits}) or fewer, or on data that reach further"


def _refuse_beyond(name: str, sent: np.ndarray, low: int, high: int, holds: str, remedy: str) -> None:
    beyond = (sent < low) | (sent > high)
    if beyond.any():
        sample, step, neuron = (int(i) for i in np.argwhere(beyond)[0])
        raise InputError(
            f"population {quoted(name)} sends {int(sent[sample, step, neuron])} at sample {sample}, step {step}, neuron"
            f" {neuron} ({int(beyond.sum()):,} of {beyond.size:,} values); {holds}, {low}..{high}. {remedy}"
        )


def read(layer: AkidaLayer, sums: np.ndarray) -> np.ndarray:
    """The last layer's messages from its whole sums, int64 (N, neurons)."""
    value = (layer.read_factor * sums.astype(np.int64) + layer.read_constant) >> layer.read_shift
    return np.maximum(value, 0) if layer.relu else value
