"""Neurons that nothing reaches and that fire at every step are a constant: a bias of the currents that they feed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from neuro.conversion.spiking.description import Description, Neurons, weighted


def _fires_always(layer: Neurons) -> bool:
    """Whether the bias alone is above the threshold at every step; v is 0 after each spike."""
    drive = layer.bias + layer.current_bias  # at the first step; a current that decays only adds to it
    return layer.reset == "zero" and not layer.reset_delayed and bool(np.all(drive > layer.threshold))


def without_constants(description: Description) -> Description:
    """The description with every such layer folded into the current biases of the layers that it feeds."""
    constant = {
        layer.name
        for layer in description.neurons
        if layer.name not in description.outputs
        and not description.incoming(layer.name)
        and np.all(layer.current_bias >= 0)
        and _fires_always(layer)
    }
    if not constant:
        return description
    added = {layer.name: np.array(layer.current_bias) for layer in description.neurons}
    for item in description.synapses:
        if item.source in constant:
            ones = torch.ones(1, 1, item.ends[1], dtype=torch.float64)
            added[item.target] = added[item.target] + weighted(item, ones).reshape(-1).numpy()
    neurons = tuple(
        replace(layer, current_bias=added[layer.name]) for layer in description.neurons if layer.name not in constant
    )
    synapses = tuple(item for item in description.synapses if item.source not in constant)
    notes = (*description.notes, f"{', '.join(sorted(constant))}: fire at every step, so what they feed has a bias instead")
    return replace(description, neurons=neurons, synapses=synapses, notes=notes)
