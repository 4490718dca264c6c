"""Building blocks of a language model whose every step has an equivalent on the chip: one token is one time step.

Each block is a module of its own, (B, T, D) -> (B, T, D), from rest, causal; a residual stream adds what it returns.
`SpikingMLP` and `SpikingMixer` send binary spikes of `snntorch.Leaky` neurons, `GradedMLP` and `GatedMixer` graded messages
(Loihi 2). Under `use_grid(block, True)` each computes what its integers compute on the chip; `neuro.language.conversion`
makes those.

What is native: leaky integration (lif neurons), a loop of one step onto the same neurons, products of two messages, and
relays, which delay. A state that is an outer product (linear attention) takes width^2 / heads product neurons and as many
integrators per layer, and its readout again as many; it is not offered.

Shape letters: B samples, T steps (tokens), D width, N neurons, K taps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from neuro.language.grid import (
    CURRENT_BITS,
    DECAY_UNITS,
    DEEPEST_SHIFT,
    EVENT_BITS,
    KEEP_BITS,
    MOST_KEPT,
    STREAM_BITS,
    VOLTAGE_BITS,
    EventGate,
    GridLinear,
    OnGrid,
    floor_to,
    held_taps,
    through,
)
from neuro.language.scan import gated_scan, lif_scan
from neuro.modules.spiking import leaky

VALUE_LIMIT, STATE_LIMIT = 8.0, 32.0  # training keeps values about within these; registers hold some times more


class ShortConvolution(OnGrid):
    """Each channel's last K values, weighted: `y_t = sum_k taps_k x_(t-k)`.

    On the chip: K relays one behind the other, each with one synapse per channel to the same neurons.

    Args:
        width: D. taps: K, 1 to 8.
    """

    def __init__(self, width: int, taps: int = 4) -> None:
        super().__init__()
        if not 1 <= taps <= 8:
            raise ValueError(f"taps is {taps}; 1 to 8 are possible")
        first = 0.3 * torch.randn(taps, width)
        first[0] += 1
        self.taps_KD = nn.Parameter(first)

    def integers(self) -> tuple[Tensor, int]:
        """Even weights int64 (K, D) and their exponent, the same for all taps."""
        return held_taps(self.taps_KD.detach().double())[1], -DEEPEST_SHIFT

    def forward(self, x_BTD: Tensor) -> Tensor:
        taps_KD = held_taps(self.taps_KD)[0] if self.on_grid else self.taps_KD
        x_BTD = floor_to(x_BTD, EVENT_BITS) if self.on_grid else x_BTD
        total_BTD = torch.zeros_like(x_BTD)
        for lag, tap_D in enumerate(taps_KD):
            late = functional.pad(x_BTD, (0, 0, lag, 0))[:, : x_BTD.shape[1]] * tap_D
            total_BTD = total_BTD + (floor_to(late, EVENT_BITS) if self.on_grid else late)
        return total_BTD


class SpikingMLP(OnGrid):
    """Linear, leaky integrate-and-fire neurons (`snntorch.Leaky`, reset to zero), linear; binary spikes in between.

    Args:
        width: D, in and out.
        hidden: neurons.
        betas: shares of v kept from step to step, one per group of hidden / len(betas) neurons; trained.
        event_threshold: of what comes in.
    """

    def __init__(self, width: int, hidden: int, *, betas: Sequence[float] = (0.5,), event_threshold: float = 0.0) -> None:
        super().__init__()
        if not betas or hidden % len(betas):
            raise ValueError(f"{hidden} neurons do not divide into {len(betas)} groups of one decay each")
        self.gate = EventGate(event_threshold)
        self.into = GridLinear(width, hidden, bits_in=EVENT_BITS, bits_out=CURRENT_BITS)
        self.neurons = nn.ModuleList(leaky(beta, learn_beta=True) for beta in betas)
        self.out = GridLinear(hidden, width, bits_in=0, bits_out=STREAM_BITS, bias=False, gain=0.3)
        self.group = hidden // len(betas)

    def keep_N(self) -> Tensor:
        """Share of v that each neuron keeps, (N,); on the grid a number of 4096ths from 1 to 4096."""
        beta_G = torch.stack([torch.as_tensor(neuron.beta).reshape(()) for neuron in self.neurons]).clamp(0, 1)
        if self.on_grid:
            held = (beta_G.detach() * DECAY_UNITS).round().clamp(1, DECAY_UNITS) / DECAY_UNITS
            beta_G = through(beta_G, held)
        return beta_G.repeat_interleave(self.group)

    def current(self, x_BTD: Tensor) -> Tensor:
        """What flows into the neurons, (B, T, N)."""
        return self.into(self.gate(x_BTD))

    def spikes(self, x_BTD: Tensor) -> Tensor:
        """Spikes, 0 or 1, (B, T, N)."""
        unit = 2.0**-VOLTAGE_BITS if self.on_grid else 0.0
        current_BTN = self.current(x_BTD)
        self.watch((current_BTN, VALUE_LIMIT))
        return lif_scan(current_BTN, self.keep_N().to(current_BTN.dtype), unit=unit)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.out(self.spikes(x_BTD))


class SpikingMixer(SpikingMLP):
    """A state-space token mixer of spikes: a short convolution, then leaky neurons of several time constants.

    Their v is the state: an exponential moving average that a spike resets.

    Args:
        width: D, in and out.
        state: neurons.
        betas: as in `SpikingMLP`; 0.5 to 0.98 remember about 1 to 50 tokens.
        taps: of the convolution.
        event_threshold: of what the convolution gives.
    """

    def __init__(
        self,
        width: int,
        state: int,
        *,
        betas: Sequence[float] = (0.5, 0.8, 0.93, 0.98),
        taps: int = 4,
        event_threshold: float = 0.0,
    ) -> None:
        super().__init__(width, state, betas=betas, event_threshold=event_threshold)
        self.convolution = ShortConvolution(width, taps)

    def current(self, x_BTD: Tensor) -> Tensor:
        return self.into(self.gate(self.convolution(x_BTD)))


class GradedMLP(OnGrid):
    """Linear, squared ReLU, linear; the hidden values are graded messages, silent where the ReLU is 0.

    Args:
        width, hidden, event_threshold: as in `SpikingMLP`.
        squared: False leaves the ReLU as it is, which saves the product neurons.
    """

    def __init__(self, width: int, hidden: int, *, squared: bool = True, event_threshold: float = 0.0) -> None:
        super().__init__()
        self.squared = squared
        self.gate = EventGate(event_threshold)
        self.into = GridLinear(width, hidden, bits_in=EVENT_BITS, bits_out=CURRENT_BITS)
        self.out = GridLinear(hidden, width, bits_in=CURRENT_BITS, bits_out=STREAM_BITS, bias=False, gain=0.0)

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden = functional.relu(self.into(self.gate(x_BTD)))
        self.watch((hidden, VALUE_LIMIT))
        if not self.squared:
            return self.out(hidden)
        if self.on_grid:
            return self.out(floor_to(floor_to(hidden, EVENT_BITS).square(), CURRENT_BITS))
        return self.out(hidden.square())


class GatedMixer(OnGrid):
    """A gated state-space token mixer: `s_t = keep_t (s_(t-1) + drive_t)`, read through a rectified gate.

        x = gate(convolution(input))   keep = relu(508/512 - relu(W_k x + b_k))       drive = W_d x + b_d
        y = relu(W_g x + b_g) s        returns W_o y

    The state is a population of product neurons with a loop onto itself; a gate at 0 sends nothing, so that reading is
    sparse. No value is normalised.

    Args:
        width: D, in and out. state: N.
        taps: of the convolution. event_threshold: of what it gives.
        memory: tokens that the slowest neurons remember at first; the fastest forget within two.
    """

    def __init__(
        self, width: int, state: int, *, taps: int = 4, event_threshold: float = 0.0, memory: float = 100.0
    ) -> None:
        super().__init__()
        if memory <= 2:
            raise ValueError(f"memory is {memory} tokens; it must be above 2")
        self.gate = EventGate(event_threshold)
        self.convolution = ShortConvolution(width, taps)
        fine = partial(GridLinear, bits_in=EVENT_BITS, bits_out=STREAM_BITS)
        self.drive = fine(width, state)
        self.forget = fine(width, state, gain=0.1)
        self.read = fine(width, state)
        self.out = fine(state, width, bias=False, gain=0.0)
        forget_N = torch.exp(torch.linspace(math.log(1 / memory), math.log(0.7), state))
        with torch.no_grad():
            assert self.forget.bias is not None
            self.forget.bias.copy_(forget_N)
            self.drive.weight.mul_((1 - (1 - forget_N) ** 2).sqrt()[:, None])  # every state starts with about the same size

    def gates(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """keep, drive, read, each (B, T, N)."""
        x_BTD = self.gate(self.convolution(x_BTD))
        forget = functional.relu(self.forget(x_BTD))
        kept = floor_to(-forget, KEEP_BITS) if self.on_grid else -forget
        return functional.relu(MOST_KEPT + kept), self.drive(x_BTD), functional.relu(self.read(x_BTD))

    def forward(self, x_BTD: Tensor) -> Tensor:
        keep, drive, read = self.gates(x_BTD)
        state = gated_scan(keep, drive, unit=2.0**-STREAM_BITS if self.on_grid else 0.0)
        self.watch((state, STATE_LIMIT), (read, VALUE_LIMIT))
        if self.on_grid:
            product = floor_to(read, EVENT_BITS) * floor_to(state, EVENT_BITS)
            return self.out(floor_to(product, EVENT_BITS))
        return self.out(read * state)
