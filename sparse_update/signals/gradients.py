"""Signals out of one backward: gradient energy and Fisher diagonal of blocks of weights, gradient norms of samples.

Shape letters: B samples, T tokens, I inputs, O outputs of a linear layer, N blocks of `block_rows` rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_update.signals.base import Signal, SignalContext, SignalError, register_signal


def block_sums(square: Tensor, block_rows: int) -> Tensor:
    """Sum over each block of `block_rows` rows (the last may be shorter): (rows, ...) -> float32 (N,)."""
    rows = square.float().reshape(len(square), -1).sum(1)
    blocks = -(-len(rows) // block_rows)
    return nn.functional.pad(rows, (0, blocks * block_rows - len(rows))).view(blocks, block_rows).sum(1)


class _Blocks(Signal):
    level = "block"
    needs = "backward"

    def __init__(self, context: SignalContext, block_rows: int = 128) -> None:
        super().__init__(context)
        self._positive(block_rows=block_rows)
        self.block_rows = block_rows

    def _squares(self, gradients: Mapping[str, Tensor | tuple[Tensor, ...]]) -> Iterator[tuple[str, Tensor]]:
        for name, gradient in gradients.items():
            parts = gradient if isinstance(gradient, tuple) else (gradient,)
            if any(not bool(part.isfinite().all()) for part in parts):
                raise SignalError(f"signal {self.name!r}: the gradient of {name} is not finite: skip this step")
            yield name, torch.cat([block_sums(part.detach() ** 2, self.block_rows) for part in parts])


@register_signal("block_energy")
class BlockEnergy(_Blocks):
    """Squared norm of the gradient of each block of rows, parameter -> (N,)."""

    def take(self, gradients: Mapping[str, Tensor | tuple[Tensor, ...]]) -> dict[str, Tensor]:
        return dict(self._squares(gradients))


@register_signal("fisher")
class Fisher(_Blocks):
    """Running mean of squared gradients summed over each block, parameter -> (N,): the trace of the empirical Fisher
    information's diagonal there. `decay` per call; corrected for its start. Without a gradient a value stays."""

    def __init__(self, context: SignalContext, block_rows: int = 128, decay: float = 0.95) -> None:
        super().__init__(context, block_rows)
        if not 0 <= decay < 1:
            raise SignalError(f"signal 'fisher': decay = {decay} must lie in [0, 1)")
        self.decay = decay
        self.mean: dict[str, Tensor] = {}
        self.calls: dict[str, int] = {}

    def take(self, gradients: Mapping[str, Tensor | tuple[Tensor, ...]]) -> dict[str, Tensor]:
        for name, square in self._squares(gradients):
            mean = self.mean.setdefault(name, torch.zeros_like(square))
            if mean.shape != square.shape:
                raise SignalError(
                    f"signal 'fisher': {name} had {len(mean)} blocks and now has {len(square)}: give whole gradients"
                )
            mean.mul_(self.decay).add_(square, alpha=1 - self.decay)
            self.calls[name] = self.calls.get(name, 0) + 1
        return {name: mean / (1 - self.decay ** self.calls[name]) for name, mean in self.mean.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"mean": dict(self.mean), "calls": dict(self.calls)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean = {name: tensor.clone() for name, tensor in state["mean"].items()}
        self.calls = {name: int(n) for name, n in state["calls"].items()}


def gram_inner(a_BTI: Tensor, g_BTO: Tensor, b_CTI: Tensor, h_CTO: Tensor) -> Tensor:
    """Inner products of per-sample gradients sum_t g_t a_t^T and sum_t h_t b_t^T of one linear layer, (B, C).

    The Gram trick (Goodfellow 2015, for sequences Li et al. 2022) where T^2 products are fewer than O I, else the products
    themselves; exact both ways.
    """
    (length, inputs), outputs = a_BTI.shape[1:], g_BTO.shape[2]
    if length * b_CTI.shape[1] * (inputs + outputs) < inputs * outputs * 2:
        left = torch.einsum("bti,csi->bcts", a_BTI, b_CTI)
        return (left * torch.einsum("bto,cso->bcts", g_BTO, h_CTO)).sum((-1, -2))
    return sample_gradients(a_BTI, g_BTO).flatten(1) @ sample_gradients(b_CTI, h_CTO).flatten(1).T


def sample_gradients(a_BTI: Tensor, g_BTO: Tensor) -> Tensor:
    """Per-sample weight gradients of a linear layer from its inputs and output gradients, (B, O, I)."""
    return g_BTO.transpose(1, 2) @ a_BTI


def sample_square(a_BTI: Tensor, g_BTO: Tensor) -> Tensor:
    """Squared norms of per-sample weight gradients of a linear layer, (B,), by whichever of both ways is cheaper."""
    (length, inputs), outputs = a_BTI.shape[1:], g_BTO.shape[2]
    if length * (inputs + outputs) < inputs * outputs:
        return ((a_BTI @ a_BTI.transpose(1, 2)) * (g_BTO @ g_BTO.transpose(1, 2))).sum((1, 2))
    return sample_gradients(a_BTI, g_BTO).square().sum((1, 2))


@contextmanager
def tapped(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """While open, a forward and backward leave (inputs (B, T, I), output gradients (B, T, O)) of each layer in the result.

    Each layer must be used once per forward, on inputs of three dimensions, outside of torch.compile.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            a_BTI = inputs[0].detach()
            if output.requires_grad:
                output.register_hook(lambda g_BTO: found.__setitem__(name, (a_BTI, g_BTO.detach())))

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@register_signal("sample_norm")
class SampleNorm(Signal):
    """Norm of each sample's gradient over the linear layers' weights, (B,), exact: open `tap()` around one backward.

        with signal.tap():
            loss.backward()                     # a sum over samples, or a mean: then multiply by their number
        norms_B = signal.norms()

    `layers`: only those whose name contains this text. A weight shared by two layers counts as two.
    """

    level = "sequence"
    needs = "backward"

    def __init__(self, context: SignalContext, layers: str = "") -> None:
        super().__init__(context)
        self._require(model=context.model)
        assert context.model is not None
        self.layers = {n: m for n, m in context.model.named_modules() if isinstance(m, nn.Linear) and layers in n}
        if not self.layers:
            raise SignalError(f"signal 'sample_norm': no linear layer's name contains {layers!r}")
        self.found: dict[str, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def tap(self) -> Iterator[None]:
        """Forward and backward inside; see the class."""
        with tapped(self.layers) as found:
            yield
        self.found = found

    def norms(self) -> Tensor:
        """Per-sample norms of the last tapped backward, float32 (B,). Raises SignalError where none was tapped."""
        if not self.found:
            raise SignalError("signal 'sample_norm': no backward has gone through tap() yet")
        return torch.stack([sample_square(a.float(), g.float()) for a, g in self.found.values()]).sum(0).sqrt()

    def flops(self, windows: int) -> int:
        length, total = self.context.context, 0
        for layer in self.layers.values():
            outputs, inputs = layer.weight.shape
            total += 2 * windows * length * min(length * (inputs + outputs), inputs * outputs)
        return total
