"""Inputs to calibrate with, the ranges that a float network takes on them, and its integers beside it.

Shape letters: B samples, T steps, F inputs, N neurons, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neuro.conversion.spiking.description import Description, FloatRun, run_float
from neuro.conversion.spiking.fitting import Seen
from neuro.conversion.spiking.network import Check, SpikingNetwork
from neuro.simulators.fixed_point import simulate

GENERATED_SAMPLES, GENERATED_STEPS = 16, 64
MOST_VALUES = 2**25  # neurons x steps x samples of a generated calibration


def generated_input(
    description: Description, steps: int | None, input_scale: float, input_range: tuple[int, int]
) -> Tensor:
    """Inputs at random: messages of the range in 5 % (first sample) to 60 % (last one) of places and steps, (B, T, F)."""
    generator = torch.Generator().manual_seed(0)
    size = math.prod(description.input_shape)
    long = steps or GENERATED_STEPS
    neurons = size + sum(layer.size for layer in description.neurons)
    samples = max(2, min(GENERATED_SAMPLES, MOST_VALUES // (long * neurons)))
    rate_B11 = torch.linspace(0.05, 0.6, samples, dtype=torch.float64)[:, None, None]
    sent = torch.rand(samples, long, size, generator=generator, dtype=torch.float64) < rate_B11
    low, high = input_range
    value = torch.randint(low, high + 1, sent.shape, generator=generator)
    if (low, high) == (0, 1):
        value = torch.ones_like(value)
    return value * sent * input_scale


def seen(description: Description, x_BTF: Tensor) -> dict[str, Seen]:
    """The largest sums, currents and potentials of each neuron in the float network, in its own units."""
    run = run_float(description, x_BTF, currents=True)
    found = {}
    for layer in description.neurons:
        current, v = run.currents[layer.name], run.potentials[layer.name]
        alpha, beta, bias = (torch.from_numpy(part.copy()) for part in (layer.alpha, layer.beta, layer.bias))

        def before(value: Tensor) -> Tensor:
            return torch.cat([torch.zeros_like(value[:, :1]), value[:, :-1]], dim=1)

        raw = beta * before(v) + current + bias  # before the reset
        parts = (current - alpha * before(current), current, torch.maximum(raw.abs(), v.abs()))
        found[layer.name] = Seen(*(part.abs().amax(dim=(0, 1)).numpy() for part in parts))
    return found


def checked(network: SpikingNetwork, description: Description, x_BTF: Tensor, *, generated: bool) -> Check:
    """Run the integers on the calibration and compare them with the float network, which sees the same messages."""
    messages = network.messages(x_BTF)
    floats = run_float(description, messages.double() * network.input_scale)
    names = [layer.name for layer in description.neurons]
    record = [f"{name}.{'v' if description.layer(name).is_readout else 'spikes'}" for name in names]
    activity = simulate(network.graph, network.present(messages.double() * network.input_scale), record=record)
    long, agreement, rates = x_BTF.shape[1], {}, {}
    for name in names:
        if not (description.layer(name).is_readout or description.layer(name).sums):
            depth = network.depths[name]
            ours = activity.spikes[name][:, depth : depth + long]
            agreement[name] = float((ours == floats.spikes[name]).double().mean())
            rates[name] = float(floats.spikes[name].mean())
    output = description.outputs[0]
    depth, readout = network.depths[output], description.layer(output).is_readout
    states = activity.states[output]["v"] if readout else activity.spikes[output]
    same = _winner(states[:, depth : depth + long].double()) == _winner(_values(floats, output, readout))
    counts = [activity.populations[name] for name in names]
    return Check(
        samples=len(x_BTF),
        steps=long,
        generated=generated,
        spike_agreement=agreement,
        spikes=rates,
        class_agreement=float(same.double().mean()),
        clips=sum(count.saturations_v for count in counts),
        wraps=sum(count.wraps_u + count.wide_a for count in counts),
        updates=sum(count.updates_active + count.updates_inactive for count in counts),
    )


def _values(run: FloatRun, name: str, readout: bool) -> Tensor:
    return run.potentials[name] if readout else run.spikes[name]


def _winner(value_BTC: Tensor) -> Tensor:
    """Class of the largest sum over time, (B,); of equal ones the lowest."""
    return value_BTC.sum(dim=1).argmax(dim=1)
