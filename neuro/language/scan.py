"""Neurons with memory over T steps, forward and backward in one loop each, without a graph of the steps.

`lif_scan` gives the spikes and the gradients of `snntorch.Leaky` (reset to zero, no delay of the reset, its default arctan
surrogate) stepped T times; `gated_scan` is the state of product neurons with a loop onto themselves. Both take a grid:
then every value is rounded as the chip's registers round it. Gradients pass a rounding as if it were not there.

Shape letters: B samples, T steps, N neurons.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Lif(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, current_TBN: Tensor, keep_N: Tensor, threshold: float, unit: float) -> Tensor:
        before_TBN, spike_TBN = torch.empty_like(current_TBN), torch.empty_like(current_TBN)
        v_BN = torch.zeros_like(current_TBN[0])
        for t in range(len(current_TBN)):
            if unit:
                kept = (v_BN * keep_N).div_(unit).trunc_().mul_(unit)
                torch.add(kept, current_TBN[t], out=before_TBN[t])
            else:
                torch.addcmul(current_TBN[t], v_BN, keep_N, out=before_TBN[t])
            spike_TBN[t] = before_TBN[t] > threshold
            v_BN = before_TBN[t] * (1 - spike_TBN[t])
        ctx.save_for_backward(before_TBN, spike_TBN, keep_N)
        ctx.threshold = threshold
        return spike_TBN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TBN: Tensor) -> tuple[Tensor | None, ...]:
        before_TBN, spike_TBN, keep_N = ctx.saved_tensors
        # snntorch.surrogate.atan with its default alpha = 2: 1 / (1 + (pi x)^2)
        slope_TBN = (before_TBN - ctx.threshold).mul_(math.pi).square_().add_(1).reciprocal_()
        through_TBN = 1 - spike_TBN - before_TBN * slope_TBN  # d v after / d v before the reset
        direct_TBN = grad_TBN * slope_TBN
        found_TBN = torch.empty_like(before_TBN)
        later_BN = torch.zeros_like(before_TBN[0])
        for t in range(len(found_TBN) - 1, -1, -1):
            torch.addcmul(direct_TBN[t], later_BN, through_TBN[t], out=found_TBN[t])
            later_BN = found_TBN[t] * keep_N
        grad_keep_N = None
        if ctx.needs_input_grad[1]:
            after_TBN = before_TBN * (1 - spike_TBN)
            grad_keep_N = (found_TBN[1:] * after_TBN[:-1]).sum(dim=(0, 1))
        return found_TBN, grad_keep_N, None, None


def lif_scan(current_BTN: Tensor, keep_N: Tensor, *, threshold: float = 1.0, unit: float = 0.0) -> Tensor:
    """`v <- keep v + current`; a spike where v > threshold, and v becomes 0 there. From rest.

    Args:
        current_BTN: float (B, T, N).
        keep_N: share of v kept from step to step, (N,), same type.
        threshold: above 0.
        unit: 0, or the value of one unit of v; `keep v` is then rounded toward zero to it.

    Returns:
        spikes, 0 or 1, (B, T, N), same type.
    """
    spike_TBN = _Lif.apply(current_BTN.transpose(0, 1).contiguous(), keep_N, threshold, unit)
    return spike_TBN.transpose(0, 1)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keep_TBN: Tensor, drive_TBN: Tensor, unit: float) -> Tensor:
        whole_TBN, state_TBN = torch.empty_like(drive_TBN), torch.empty_like(drive_TBN)
        state_BN = torch.zeros_like(drive_TBN[0])
        for t in range(len(drive_TBN)):
            torch.add(state_BN, drive_TBN[t], out=whole_TBN[t])
            state_BN = torch.mul(keep_TBN[t], whole_TBN[t], out=state_TBN[t])
            if unit:
                state_BN.div_(unit).floor_().mul_(unit)
        ctx.save_for_backward(keep_TBN, whole_TBN)
        return state_TBN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TBN: Tensor) -> tuple[Tensor | None, ...]:
        keep_TBN, whole_TBN = ctx.saved_tensors
        grad_keep_TBN, grad_drive_TBN = torch.empty_like(keep_TBN), torch.empty_like(keep_TBN)
        later_BN = torch.zeros_like(keep_TBN[0])
        for t in range(len(keep_TBN) - 1, -1, -1):
            total_BN = grad_TBN[t] + later_BN
            torch.mul(total_BN, whole_TBN[t], out=grad_keep_TBN[t])
            later_BN = torch.mul(total_BN, keep_TBN[t], out=grad_drive_TBN[t])
        return grad_keep_TBN, grad_drive_TBN, None


def gated_scan(keep_BTN: Tensor, drive_BTN: Tensor, *, unit: float = 0.0) -> Tensor:
    """`s <- keep (s + drive)` from s = 0.

    Args:
        keep_BTN: what each neuron keeps at each step, float (B, T, N).
        drive_BTN: what is added before, same shape and type.
        unit: 0, or the value of one unit of s, to which s is rounded down at each step.

    Returns:
        s after each step, (B, T, N), same type.
    """
    keep_TBN, drive_TBN = (x.transpose(0, 1).contiguous() for x in (keep_BTN, drive_BTN))
    return _Gated.apply(keep_TBN, drive_TBN, unit).transpose(0, 1)
