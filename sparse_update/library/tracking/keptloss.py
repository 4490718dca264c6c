"""Nodes of autograd at the head of a gated backward: the loss of kept rows, and the moment when they come into force.

Shape letters: B batch, T token, V vocabulary, N = B T, K kept rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_update.library.tracking.rows import GateError, Rows


class Arm(torch.autograd.Function):
    """Identity on a loss; the first node of its backward, where the kept rows of that loss come into force."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, rows: Rows, units: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.rows, ctx.units, ctx.shape = rows, units, shape
        return loss.clone()  # no view: trainers scale losses in place

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise GateError(
                "gate.loss under create_graph=True: gated layers form no gradient of a gradient. For a gradient penalty "
                "take a loss of your own and run it in a backward of its own, or detach the gate for this step"
            )
        ctx.rows.arm(ctx.units, ctx.shape)
        return g, None, None, None


class Aside(torch.autograd.Function):
    """Adds a loss of all rows to one of kept rows: its gradient is formed first, in a backward of its own."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, others: Tensor, holder: list[Tensor], rows: Rows) -> Tensor:
        ctx.holder, ctx.rows = holder, rows
        return loss + others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        if ctx.rows.armed:
            raise GateError("one backward runs through two gated losses: call backward() once for each gate.loss(...)")
        torch.autograd.backward(ctx.holder[0], g.to(ctx.holder[0].dtype), retain_graph=True)
        return g, None, None, None


class KeptLoss(torch.autograd.Function):
    """sum(weight * cross-entropy) / normaliser over kept rows of logits (B, T, V); gradient rows of the others are zero.

    Arguments: logits, labels (N,), kept rows (K,), weight (K,), normaliser. The softmax is formed for kept rows only.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_BTV: Tensor, labels_N: Tensor, flat_K: Tensor, weight_K: Tensor, normaliser: Tensor
    ) -> Tensor:
        kept_KV = logits_BTV.reshape(-1, logits_BTV.shape[-1]).index_select(0, flat_K)
        labels_K = labels_N[flat_K]
        wide = kept_KV if kept_KV.dtype == torch.float64 else kept_KV.float()
        loss_K = F.cross_entropy(wide, labels_K, reduction="none", ignore_index=-100)
        ctx.save_for_backward(kept_KV, labels_K, flat_K, weight_K / normaliser)
        ctx.like = logits_BTV.shape
        return (loss_K * weight_K).sum() / normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        kept_KV, labels_K, flat_K, scale_K = ctx.saved_tensors
        wide = kept_KV if kept_KV.dtype == torch.float64 else kept_KV.float()
        d_KV = torch.softmax(wide, dim=-1)
        valid_K = labels_K >= 0
        d_KV.scatter_add_(1, labels_K.clamp(min=0)[:, None], -torch.ones_like(d_KV[:, :1]))
        d_KV *= (g * scale_K * valid_K)[:, None]
        d_NV = kept_KV.new_zeros(ctx.like[0] * ctx.like[1], ctx.like[2])
        d_NV.index_copy_(0, flat_K, d_KV.to(kept_KV.dtype))
        return d_NV.view(ctx.like), None, None, None, None
