"""Signals from something smaller than the model: an n-gram table, a tiny Transformer, an early exit of the model itself.

Shape letters: N windows offered, B windows of a step, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_update.data.records import Batch
from sparse_update.signals.base import Signal, SignalContext, SignalError, register_signal
from sparse_update.surprise import NgramTable
from sparse_update.transformer import ModelConfig, Transformer, token_loss

CHUNK = 64
"""Windows that go through a proxy's forward together."""


def forward_flops(cfg: ModelConfig, windows: int, layers: int | None = None, head: bool = True) -> int:
    """FLOPs of the matrix products of a forward over windows of T = cfg.context; attention dense, masked half included."""
    length, depth = cfg.context, cfg.layers if layers is None else layers
    weights = 4 * cfg.width**2 + 2 * cfg.hidden_ratio * cfg.width**2
    per_token = depth * (2 * weights + 4 * length * cfg.width) + (2 * cfg.width * cfg.vocab_size if head else 0)
    return windows * length * per_token


@torch.no_grad()
def model_loss(model: nn.Module, tokens_NT1: Tensor, device: torch.device | str) -> Tensor:
    """Loss of each token in nats under `model`, float32 (N, T), on the CPU where the windows are."""
    parts = [part.to(device) for part in tokens_NT1.split(CHUNK)]
    training = model.training
    model.eval()
    losses = [token_loss(model(part[:, :-1]), part[:, 1:]) for part in parts]
    model.train(training)
    return torch.cat(losses).to(tokens_NT1.device)


@register_signal("ngram")
class Ngram(Signal):
    """Surprise under a hashed n-gram table that learns everything offered, nats per token (`surprise.NgramTable`)."""

    def __init__(
        self,
        context: SignalContext,
        orders: Sequence[int] = (1, 2, 4, 8),
        bits: int = 21,
        strength: float = 0.3,
    ) -> None:
        super().__init__(context)
        self.table = NgramTable(context.vocab_size, tuple(orders), bits, strength, context.device)

    def score(self, batch: Batch) -> Tensor:
        return self.table.score_and_update(batch.tokens)

    def flops(self, windows: int) -> int:
        return windows * self.context.context * (4 * len(self.table.orders) + 1)

    def state_dict(self) -> dict[str, Any]:
        return self.table.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.table.load_state_dict(dict(state))


class Adam:
    """Adam (Kingma and Ba 2015) over a handful of tensors, for proxies: its state is named like the parameters."""

    def __init__(self, module: nn.Module, lr: float) -> None:
        self.module, self.lr, self.steps = module, lr, 0
        self.first = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
        self.second = {name: torch.zeros_like(p) for name, p in module.named_parameters()}

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        for name, p in self.module.named_parameters():
            if p.grad is None:
                continue
            self.first[name].lerp_(p.grad, 0.1)
            self.second[name].lerp_(p.grad * p.grad, 0.01)
            scale = math.sqrt(1 - 0.99**self.steps) / (1 - 0.9**self.steps)
            p.addcdiv_(self.first[name], self.second[name].sqrt().add_(1e-8), value=-self.lr * scale)
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "first": dict(self.first), "second": dict(self.second)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = int(state["steps"])
        for own, saved in ((self.first, state["first"]), (self.second, state["second"])):
            for name, tensor in own.items():
                tensor.copy_(saved[name])


class _Trained(Signal):
    """A proxy with weights and an optimizer of its own."""

    proxy: nn.Module
    optimizer: Adam

    def state_dict(self) -> dict[str, Any]:
        return {"proxy": dict(self.proxy.state_dict()), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.proxy.load_state_dict(state["proxy"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _descend(self, loss: Tensor) -> None:
        if bool(loss.isfinite()):
            with torch.enable_grad():
                loss.backward()
            self.optimizer.step()


@register_signal("tiny")
class Tiny(_Trained):
    """Loss under a tiny Transformer, nats per token, that trains along on a share of what is offered, after scoring it."""

    def __init__(
        self,
        context: SignalContext,
        width: int = 16,
        layers: int = 1,
        heads: int = 2,
        lr: float = 5e-3,
        train_share: float = 0.25,
    ) -> None:
        super().__init__(context)
        self._positive(lr=lr)
        if not 0 < train_share <= 1:
            raise SignalError(f"signal 'tiny': train_share = {train_share} must lie in (0, 1]")
        cfg = ModelConfig("proxy", width, layers, heads, context.context, vocab_size=context.vocab_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            self.proxy: Transformer = Transformer(cfg).to(context.device)
        self.optimizer, self.train_share = Adam(self.proxy, lr), train_share

    def score(self, batch: Batch) -> Tensor:
        loss = model_loss(self.proxy, batch.tokens, self.context.device)
        every = round(1 / self.train_share)
        for part in batch.tokens[::every].split(CHUNK // 2):
            tokens = part.to(self.context.device)
            with torch.enable_grad():
                self._descend(token_loss(self.proxy(tokens[:, :-1]), tokens[:, 1:]).mean())
        return loss

    def flops(self, windows: int) -> int:
        trained = -(-windows // round(1 / self.train_share))
        return forward_flops(self.proxy.cfg, windows + 3 * trained)


@register_signal("early_exit")
class EarlyExit(_Trained):
    """Loss through an exit head on the first `layers` blocks of the model being trained, nats per token.

    The head (RMS norm, then (V, D)) learns on a share `train_share` of each step's windows; the model does not feel it.
    """

    def __init__(self, context: SignalContext, layers: int = 1, lr: float = 5e-3, train_share: float = 0.25) -> None:
        super().__init__(context)
        self._require(model=context.model)
        self._positive(lr=lr)
        if not isinstance(context.model, Transformer):
            raise SignalError(
                f"signal 'early_exit': {type(context.model).__name__} has no blocks to leave; use tiny or ngram"
            )
        depth = context.model.cfg.layers
        if not 1 <= layers <= depth:
            raise SignalError(f"signal 'early_exit': layers = {layers} must lie in 1 to {depth}, the model's")
        if not 0 < train_share <= 1:
            raise SignalError(f"signal 'early_exit': train_share = {train_share} must lie in (0, 1]")
        self.model, self.layers, self.train_share = context.model, layers, train_share
        self.proxy = nn.Linear(self.model.cfg.width, context.vocab_size, bias=False, device=context.device)
        nn.init.zeros_(self.proxy.weight)
        self.optimizer = Adam(self.proxy, lr)

    @torch.no_grad()
    def _hidden(self, tokens_BT: Tensor) -> Tensor:
        length = tokens_BT.shape[1]
        cos, sin = self.model.cos[:length], self.model.sin[:length]  # type: ignore[index]
        x_BTD = self.model.embed(tokens_BT)
        for block in list(self.model.blocks)[: self.layers]:
            x_BTD = block(x_BTD, cos, sin)
        return nn.functional.rms_norm(x_BTD, (x_BTD.shape[-1],))

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        losses = []
        for part in batch.tokens.split(CHUNK):
            tokens = part.to(self.context.device)
            losses.append(token_loss(self.proxy(self._hidden(tokens[:, :-1])), tokens[:, 1:]))
        return torch.cat(losses).to(batch.tokens.device)

    def observe(self, batch: Batch, loss_BT: Tensor, progress: float) -> None:
        tokens = batch.tokens[:: round(1 / self.train_share)].to(self.context.device)
        with torch.enable_grad():
            self._descend(token_loss(self.proxy(self._hidden(tokens[:, :-1])), tokens[:, 1:]).mean())

    def flops(self, windows: int) -> int:
        """Of scoring, and of the head's learning on as many windows, the most that can follow."""
        cfg, share = self.model.cfg, -(-windows // round(1 / self.train_share))
        head = 2 * cfg.context * cfg.width * cfg.vocab_size
        return forward_flops(cfg, windows + share, self.layers, head=False) + head * (windows + 2 * share)
