"""Inactive strips that move by the sign of their gradient, without state (FRUGAL, Zmushko et al., ICML 2025,
arXiv 2411.07837), inside of the user's own `optimizer.step()`."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparse_update.library.hooks import on_every_step
from sparse_update.library.strips import Strips


class SignDescent:
    """w <- w (1 - lr decay) - lr scale sign(g) for the inactive strips of a matrix, when the optimizer that holds its
    active ones has taken a step; lr and weight decay are those of their parameter group in that step.

    A step of a fused optimizer that a gradient scaler found to overflow moves nothing.

    Args:
        strips: active and inactive ones.
        scale: step of the inactive, as a share of the learning rate.
    """

    def __init__(self, strips: Strips, scale: float) -> None:
        self.strips, self.scale = strips, scale
        self.close = on_every_step(register_optimizer_step_post_hook, self, type(self).move)
        """Move nothing any more."""

    @torch.no_grad()
    def move(self, optimizer: Any) -> None:
        """Called after a step of any optimizer; those that hold none of the strips are let be."""
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and bool(overflow.item()):
            return
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name in self.strips.layers:
            found = (groups.get(id(leaf)) for leaf in self.strips.of(name))
            group = next((group for group in found if group is not None), None)
            if group is None:
                continue
            rate = float(group["lr"])
            for leaf in self.strips.signs_of(name):
                if leaf.grad is not None:
                    leaf.mul_(1 - rate * group.get("weight_decay", 0.0))
                    leaf.add_(leaf.grad.sign_(), alpha=-rate * self.scale)
                    leaf.grad = None
