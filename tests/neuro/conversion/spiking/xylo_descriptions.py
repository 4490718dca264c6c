"""Random spiking networks in real numbers with resets that Xylo has: loops, biases, values, decays on and off its grid."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from neuro.conversion.spiking.description import INPUT, Description, Neurons, Synapses

ON_GRID = (0.5, 0.75, 0.875, 0.9375)


def description(seed: int, *, value: bool | None = None, on_grid: bool = True) -> Description:
    """A network; the same seed gives the same one.

    One or two hidden layers, every second with a loop, every third with a bias, every third a plain LIF without a current
    that decays, every third with a reset a step later. `value`: whether the output is v (default: every fourth seed).
    """
    rng = np.random.default_rng(seed)
    inputs, sizes = int(rng.integers(3, 9)), [int(rng.integers(6, 16)) for _ in range(1 + seed % 2)]
    neurons, synapses, before, width = [], [], INPUT, inputs

    def share() -> float:
        return float(rng.choice(ON_GRID)) if on_grid else float(rng.uniform(0.45, 0.95))

    for number, size in enumerate(sizes):
        name = f"h{number}"
        plain = seed % 3 == 0
        bias = rng.uniform(0, 0.05, size) if seed % 3 == 1 else 0.0
        neurons.append(
            Neurons(
                name, (size,), alpha=0.0 if plain else share(), beta=share(), threshold=rng.uniform(0.8, 1.2), bias=bias,
                reset="subtract", reset_delayed=seed % 3 == 2,
            )
        )  # fmt: skip
        scale = (1 - float(neurons[-1].alpha[0])) * (1 - float(neurons[-1].beta[0])) / width**0.5
        synapses.append(Synapses(f"w{number}", before, name, rng.normal(2.5 * scale, 5 * scale, (size, width))))
        if seed % 2:
            loop = rng.normal(0, 1.5 * scale, (size, size))
            synapses.append(Synapses(f"loop{number}", name, name, loop))
        before, width = name, size
    is_value = seed % 4 == 3 if value is None else value
    out = Neurons("y", (3,), alpha=share(), beta=share(), threshold=np.inf if is_value else 1.0, reset="subtract")
    scale = (1 - float(out.alpha[0])) * (1 - float(out.beta[0])) / width**0.5
    synapses.append(Synapses("out", before, "y", rng.normal(2 * scale, 8 * scale, (3, width))))
    return Description((inputs,), (*neurons, out), tuple(synapses), ("y",))


def samples(described: Description, seed: int, count: int = 12, steps: int = 40) -> Tensor:
    """Spikes in 15 to 45 % of the places, (B, T, F)."""
    generator = torch.Generator().manual_seed(seed)
    rate = torch.linspace(0.15, 0.45, count, dtype=torch.float64)[:, None, None]
    rates = rate * (0.5 + torch.rand(count, 1, described.input_shape[0], generator=generator, dtype=torch.float64))
    sent = torch.rand(count, steps, described.input_shape[0], generator=generator, dtype=torch.float64) < rates
    return sent.double()
