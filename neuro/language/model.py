"""A language model of which all but the table look-up and the head runs on the chip, one token a step.

Shape letters: B samples, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from hardware.text import quoted
from neuro.language.blocks import GatedMixer, GradedMLP, SpikingMixer, SpikingMLP
from neuro.language.grid import STREAM_BITS, GridLinear, OnGrid, round_to, use_grid

NEURONS = ("graded", "lif")
STREAM_LIMIT = 16.0  # training keeps the residual stream about within


@dataclass(frozen=True)
class LanguageConfig:
    """Sizes of a `SpikingLanguageModel`; `state` and `hidden` 0 mean: as many as give a Transformer block's parameters.

    Raises ValueError for sizes below 1 or neurons that do not exist.
    """

    vocab_size: int
    width: int = 64
    layers: int = 3
    state: int = 0
    hidden: int = 0
    neurons: str = "graded"
    taps: int = 4
    event_threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.neurons not in NEURONS:
            raise ValueError(f"neurons is {quoted(self.neurons)}; there is: {', '.join(NEURONS)}")
        for key in ("vocab_size", "width", "layers"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; at least 1")
        # A block of a Transformer has 12 D^2. Four matrices of D x state here, or two.
        if not self.state:
            object.__setattr__(self, "state", self.width if self.neurons == "graded" else 2 * self.width)
        if not self.hidden:
            object.__setattr__(self, "hidden", 4 * self.width)


class SpikingLanguageModel(OnGrid):
    """Embedding (host), `layers` times mixer and MLP on a residual stream (chip), normalisation and head (host).

    `forward`: tokens (B, T) int64 -> logits (B, T, V), from rest, any T. There is no normalisation between the blocks:
    it is no operation of the chip's neurons. Draws its weights from torch's global generator: seed it first.

    Train it in floats, then some more on the grid (`on_chip_grid(True)`), where gradients pass every rounding;
    `neuro.language.conversion.convert_language` then gives a graph with the same values.
    """

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        width, threshold = config.width, config.event_threshold
        self.embed = nn.Embedding(config.vocab_size, width)
        self.mixers, self.mlps = nn.ModuleList(), nn.ModuleList()
        for _ in range(config.layers):
            if config.neurons == "graded":
                self.mixers.append(GatedMixer(width, config.state, taps=config.taps, event_threshold=threshold))
                self.mlps.append(GradedMLP(width, config.hidden, event_threshold=threshold))
            else:
                self.mixers.append(SpikingMixer(width, config.state, taps=config.taps, event_threshold=threshold))
                self.mlps.append(SpikingMLP(width, config.hidden, event_threshold=threshold))
        self.gain = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, config.vocab_size, bias=False)
        nn.init.normal_(self.embed.weight, std=0.5)
        nn.init.normal_(self.head.weight, std=0.02 * (768 / width) ** 0.5)

    def on_chip_grid(self, on: bool) -> None:
        """Compute as the chip's integers do, or in plain floats. The first True chooses every weight's grid."""
        use_grid(self, on)

    def stream(self, tokens_BT: Tensor) -> Tensor:
        """What enters the chip, (B, T, D)."""
        x_BTD = self.embed(tokens_BT)
        return round_to(x_BTD, STREAM_BITS) if self.on_grid else x_BTD

    def read_out(self, stream_BTD: Tensor) -> Tensor:
        """What the host makes of what leaves the chip: x / rms(x) x gain, then the head; (B, T, V)."""
        return self.head(functional.rms_norm(stream_BTD, self.gain.shape, self.gain, 1e-6))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD, streams = self.stream(tokens_BT), []
        for mixer, mlp in zip(self.mixers, self.mlps, strict=True):
            x_BTD = x_BTD + mixer(x_BTD)
            x_BTD = x_BTD + mlp(x_BTD)
            streams += [(x_BTD, STREAM_LIMIT)]
        self.watch(*streams)
        return self.read_out(x_BTD)

    def macs_per_token(self) -> dict[str, int]:
        """Multiply-accumulates of dense arithmetic, on the chip and on the host; a look-up is none."""
        chip = sum(part.weight.numel() for part in self.modules() if isinstance(part, GridLinear))
        taps = sum(p.numel() for name, p in self.named_parameters() if name.endswith("taps_KD"))
        return {"chip": chip + taps, "host": self.head.weight.numel()}
