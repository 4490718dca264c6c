"""Random networks of snnTorch whose weights, biases and thresholds lie on a binary grid, and snnTorch's run of them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Pairs = list[tuple[nn.Linear, Any]]
KINDS = ("Leaky", "Synaptic", "RLeaky", "RSynaptic")
RESETS = ("zero", "subtract", "none")


def layer(rng: np.random.Generator, n_in: int, n_out: int, bias: bool, kind: str, reset: str, delayed: bool) -> Any:
    """A linear layer and its neurons: sixteenths as weights, decays 1/2 or 1, thresholds of few bits, some per neuron."""
    import snntorch

    def sixteenths(low: int, high: int, *shape: int) -> Tensor:
        return torch.from_numpy(rng.integers(low, high, shape) / 16)

    linear = nn.Linear(n_in, n_out, bias=bias).double()
    with torch.no_grad():
        linear.weight.copy_(sixteenths(-8, 16, n_out, n_in))
        if bias:
            linear.bias.copy_(sixteenths(-4, 8, n_out))
    own_decays, own_thresholds, one_to_one = (bool(n) for n in rng.integers(0, 2, 3))
    beta = torch.from_numpy(rng.choice([0.5, 1.0], n_out)) if own_decays else float(rng.choice([0.5, 1.0]))
    threshold: Any = float(rng.choice([0.5, 0.75, 1.0, 1.5]))
    if own_thresholds:
        threshold = torch.from_numpy(rng.choice([0.5, 1.0, 2.0], n_out))
    settings = {"beta": beta, "threshold": threshold, "reset_mechanism": reset, "reset_delay": delayed}
    if "Synaptic" in kind:
        settings["alpha"] = 0.5
    if kind.startswith("R"):
        settings |= {"all_to_all": False, "V": sixteenths(-8, 8, n_out)} if one_to_one else {"linear_features": n_out}
    neuron = getattr(snntorch, kind)(**settings).double()
    snntorch.SpikingNeuron.instances.remove(neuron)
    if kind.startswith("R") and not one_to_one:
        with torch.no_grad():
            neuron.recurrent.weight.copy_(sixteenths(-8, 8, n_out, n_out))
            neuron.recurrent.bias.copy_(sixteenths(-2, 4, n_out) * bias)
    return linear, neuron


def network(seed: int) -> tuple[Pairs, Tensor]:
    """One to three layers of random kinds and resets, and binary input (samples, steps, features)."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 8, int(rng.integers(2, 5))).tolist()
    steps, bias = int(rng.integers(3, 8)), bool(rng.integers(2))
    pairs = []
    for n_in, n_out in pairwise(sizes):
        kind, reset, delayed = str(rng.choice(KINDS)), str(rng.choice(RESETS)), bool(rng.integers(2))
        delayed |= reset == "subtract"  # at once: snnTorch subtracts twice above two thresholds, a named difference
        pairs.append(layer(rng, n_in, n_out, bias, kind, reset, delayed))
    return pairs, torch.from_numpy(rng.integers(0, 2, (6, steps, sizes[0]))).double()


@torch.no_grad()
def snntorch_spikes(pairs: Pairs, x_BTF: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Spikes and potentials of each layer, (B, T, N), by calling snnTorch's neurons step by step.

    From rest: called without states, neurons go on from those of their last call.
    """
    for _, neuron in pairs:
        neuron.reset_mem()
    states: list[tuple[Tensor, ...]] = [() for _ in pairs]
    spikes: list[list[Tensor]] = [[] for _ in pairs]
    potentials: list[list[Tensor]] = [[] for _ in pairs]
    for x_BF in x_BTF.unbind(dim=1):
        for index, (linear, neuron) in enumerate(pairs):
            given = states[index]
            if type(neuron).__name__ == "RSynaptic" and not neuron.reset_delay and not given:
                given = tuple(torch.zeros_like(linear(x_BF)) for _ in range(3))  # it reads the arguments themselves
            spike, *state = neuron(linear(x_BF), *given)
            x_BF = spike.double()  # snnTorch gives float32
            states[index] = (x_BF, *state) if hasattr(neuron, "recurrent") else tuple(state)
            spikes[index].append(x_BF)
            potentials[index].append(state[-1])
    return [torch.stack(s, dim=1) for s in spikes], [torch.stack(p, dim=1) for p in potentials]
