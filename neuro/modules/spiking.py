"""Trainable spiking layers on snnTorch: leaky integrate-and-fire neurons, two input codes, a classifier that counts spikes.

The neurons are `snntorch.Leaky` with reset to zero, which is what the chip's neurons do; `neuro.conversion.lif` turns a
trained network into an integer graph. Shape letters: B samples, T steps, F features, N neurons, C classes.
snntorch is imported when a layer is built, not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from neuro.simulators.snntorch_backend import SnnTorchUnavailable


def current_code(values_BF: Tensor, steps: int) -> Tensor:
    """Each value as a constant current: (B, F) -> (B, T, F), the same type. On a chip: a graded message at each step."""
    _check_code(values_BF, steps)
    return values_BF[:, None].expand(-1, steps, -1).contiguous()


def rate_code(values_BF: Tensor, steps: int, generator: torch.Generator | None = None) -> Tensor:
    """Each value in 0..1 as a spike train of that rate: (B, F) -> 0 or 1, float32 (B, T, F).

    Args:
        values_BF: shares of steps with a spike, 0..1.
        steps: T.
        generator: draws each spike at random; None spreads round(T x value) spikes evenly, the same at every call.

    Raises:
        ValueError: values outside 0..1, another form than (B, F), or no step.
    """
    _check_code(values_BF, steps)
    low, high = (float(edge) for edge in torch.aminmax(values_BF))
    if low < 0 or high > 1:
        raise ValueError(f"a rate code takes values in 0..1 and was given {low:g}..{high:g}; divide by the largest first")
    if generator is not None:
        draw = torch.rand(len(values_BF), steps, values_BF.shape[1], generator=generator, device=values_BF.device)
        return (draw < values_BF[:, None]).float()
    total_B1F = torch.floor(values_BF.double() * steps + 0.5)[:, None]
    until_T1 = torch.arange(steps + 1, device=values_BF.device, dtype=torch.float64)[:, None]
    return torch.floor(total_B1F * until_T1 / steps).diff(dim=1).float()


def _check_code(values_BF: Tensor, steps: int) -> None:
    if values_BF.ndim != 2 or 0 in values_BF.shape:
        raise ValueError(f"a code takes (batch, features) and was given {tuple(values_BF.shape)}")
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least 1 is needed")


def leaky(beta: float, *, threshold: float = 1.0, learn_beta: bool = False) -> nn.Module:
    """`snntorch.Leaky` as the chip's neurons are: reset to zero at once, spikes where v > threshold.

    Raises:
        SnnTorchUnavailable: snntorch is not installed.
        ValueError: beta outside 0..1, or a threshold that is not above 0.
    """
    try:
        import snntorch
    except ImportError as error:
        raise SnnTorchUnavailable(f"snntorch is not installed ({error}); pip install 'spikegate[spiking]'") from error
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}; it is a share, 0..1")
    if threshold <= 0:
        raise ValueError(f"threshold is {threshold}; it must be above 0")
    neuron = snntorch.Leaky(
        beta=beta, threshold=threshold, reset_mechanism="zero", reset_delay=False, learn_beta=learn_beta
    )
    snntorch.SpikingNeuron.instances.remove(neuron)  # a list of the class, which would keep it for ever
    return neuron


class SpikingLayer(nn.Module):
    """A linear layer into leaky integrate-and-fire neurons.

    `v <- beta v + W x + b`; a spike where v > threshold, and v becomes 0 there.

    Args:
        n_in, n_out: sizes.
        beta: share of v that is kept from step to step, 0..1.
        threshold: above 0.
        bias: whether b is there.
        learn_beta: whether beta is trained.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        beta: float = 0.9,
        threshold: float = 1.0,
        bias: bool = True,
        learn_beta: bool = False,
    ) -> None:
        super().__init__()
        self.neuron = leaky(beta, threshold=threshold, learn_beta=learn_beta)
        self.linear = nn.Linear(n_in, n_out, bias=bias)

    def forward(self, x_BTF: Tensor) -> tuple[Tensor, Tensor]:
        """From rest through T steps: spikes, 0 or 1, and v after each step, both (B, T, N)."""
        current_BTN = self.linear(x_BTF)
        v_BN = torch.zeros_like(current_BTN[:, 0])
        spikes, membrane = [], []
        for current_BN in current_BTN.unbind(dim=1):
            spike_BN, v_BN = self.neuron(current_BN, v_BN)
            spikes.append(spike_BN.to(v_BN.dtype))  # snnTorch gives float32
            membrane.append(v_BN)
        return torch.stack(spikes, dim=1), torch.stack(membrane, dim=1)


class SpikingClassifier(nn.Module):
    """Spiking layers one behind the other; the class is the last layer's neuron that spiked most.

    Args:
        sizes: features, neurons of each hidden layer, classes; at least two numbers.
        beta, threshold, bias, learn_beta: as `SpikingLayer`, for all layers.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        beta: float = 0.9,
        threshold: float = 1.0,
        bias: bool = True,
        learn_beta: bool = False,
    ) -> None:
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes is {tuple(sizes)}; features and classes are needed, each at least 1")
        self.layers = nn.ModuleList(
            SpikingLayer(n_in, n_out, beta=beta, threshold=threshold, bias=bias, learn_beta=learn_beta)
            for n_in, n_out in pairwise(sizes)
        )

    def forward(self, x_BTF: Tensor) -> Tensor:
        """Coded input (B, T, F) -> spikes of the last layer, (B, T, C)."""
        for layer in self.layers:
            x_BTF, _ = layer(x_BTF)
        return x_BTF

    def rates(self, x_BTF: Tensor) -> list[Tensor]:
        """Share of steps with a spike, per layer, (B, N) each: what a chip's traffic follows from."""
        found = []
        for layer in self.layers:
            x_BTF, _ = layer(x_BTF)
            found.append(x_BTF.mean(dim=1))
        return found


def count_loss(spikes_BTC: Tensor, target_B: Tensor, sharpness: float = 0.5) -> Tensor:
    """Cross entropy in nats of `softmax(sharpness x spike counts)` against the classes, mean over the batch."""
    return functional.cross_entropy(spikes_BTC.sum(dim=1) * sharpness, target_B)


def predicted(spikes_BTC: Tensor) -> Tensor:
    """Class with the most spikes, int64 (B,); of equal counts the lowest, on every backend."""
    counts = spikes_BTC.to(torch.int64).sum(dim=1)
    classes = counts.shape[1]
    return (counts * classes + torch.arange(classes - 1, -1, -1, device=counts.device)).argmax(dim=1)
