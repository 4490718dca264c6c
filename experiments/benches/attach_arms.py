"""Models and steps of `bench attach`: a training step of somebody's own loop, with a gate on the model and without one.

Shape letters: B batch, T token, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparse_update.library.attach import Gate, attach
from sparse_update.transformer import ModelConfig, Transformer

MODELS = ("transformer", "llama")
ARMS: dict[str, dict[str, Any]] = {
    "attached": {},
    "rows 1": {"backward": {"unit": "token", "keep_fraction": 1.0}},
    "rows 0.5": {"backward": {"unit": "token", "keep_fraction": 0.5}},
    "rows 0.25": {"backward": {"unit": "token", "keep_fraction": 0.25}},
}
"""Settings of the gate, all others as they are by default. "attached" and "rows 1" keep everything; the second chooses."""
BLOCKS = {"weights": {"kind": "blocks", "active_fraction": 0.25}}
"""Of the memory arm."""
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of its batch; by default those of GPT-2 small's blocks, cut to what two cores bear."""

    width: int = 768
    layers: int = 2
    heads: int = 12
    hidden: int = 3072
    vocab: int = 1024
    batch: int = 2
    length: int = 256

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"--{name} {value}: must be at least 1")
        if self.hidden % self.width or self.width % (2 * self.heads):
            raise ValueError(
                f"--hidden {self.hidden} must be a multiple of --width {self.width}, and that one of twice --heads "
                f"{self.heads}"
            )


def build(name: str, shape: Shape, device: torch.device) -> nn.Module:
    """A model in training mode, the same weights every time.

    Raises ModuleNotFoundError for "llama" where transformers is not installed.
    """
    torch.manual_seed(0)
    if name == "transformer":
        return _transformer(shape).to(device)
    return _llama(shape).to(device)


def _transformer(shape: Shape) -> nn.Module:
    cfg = ModelConfig(
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        context=shape.length,
        hidden_ratio=shape.hidden // shape.width,
        vocab_size=shape.vocab,
        attention="sdpa",
    )
    return Transformer(cfg)


def _llama(shape: Shape) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.length,
        use_cache=False,
    )
    made: nn.Module = LlamaForCausalLM(config).train()
    return made


def tokens(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and labels, int64 (B, T) each."""
    drawn = torch.randint(0, shape.vocab, (shape.batch, shape.length + 1), generator=torch.Generator().manual_seed(0))
    drawn = drawn.to(device)
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


class Arm:
    """One model with its optimizer, and a gate where `config` is given. `step()` is a whole training step."""

    def __init__(
        self, model: nn.Module, x: Tensor, y: Tensor, config: Mapping[str, Any] | None, compiled: bool = False
    ) -> None:
        self.model, self.x, self.y = model, x, y
        self.gate: Gate | None = None if config is None else attach(model, copy.deepcopy(dict(config)))
        self.parameters = [*(model.parameters() if self.gate is None else self.gate.parameters())]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self._run: Callable[[Tensor], Any] = torch.compile(model) if compiled else model

    def loss(self) -> Tensor:
        """Mean cross-entropy in nats, with its graph."""
        output = self._run(self.x)
        logits = output if isinstance(output, Tensor) else output.logits
        if self.gate is not None:
            return self.gate.loss(logits, self.y)
        return F.cross_entropy(logits.flatten(0, 1), self.y.flatten())

    def step(self, micro_batches: int = 1) -> None:
        """Forward and backward (of as many micro-batches), the optimizer's step, and the gate's."""
        for _ in range(micro_batches):
            self.loss().backward()
        self.optimizer.step()
        if self.gate is not None:
            self.gate.step(self.optimizer)
        self.optimizer.zero_grad()


def count_flops(arm: Arm) -> int:
    """FLOPs of one eager step as torch's counter sees them, two for a multiply-accumulate.

    The step before it is not counted: a gate may look at the model once, in its first loss. Attention is run as plain
    products meanwhile: the counter knows no fused attention of the CPU (findings/torch_flop_counter_attention.sh). It is
    therefore counted in full, without the causal half, in every arm.
    """
    arm.step()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        arm.step()
    return int(counter.get_total_flops())
