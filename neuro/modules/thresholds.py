"""Event thresholds that learn: what is too small to matter becomes exactly 0 and sends no event.

    y = x where |x| > theta_C (two-sided), or where x > theta_C (one-sided, ReLU included), else 0

    gate = EventThreshold(64)
    y = gate(x)                     # (..., 64)
    gate.rate_C                     # share of rows that send an event on each channel, with a gradient to theta

The step of the gate has no derivative, so the backward pass puts a surrogate in its place: a callable that maps u to
1[u > 0] and brings its own gradient. `sigmoid_step` is ours; `snntorch.surrogate.atan()` and its like fit as well.

Shape letters: C channels, N rows (all leading axes flattened).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hardware.text import quoted

Step = Callable[[Tensor], Tensor]
GRADIENTS = ("count", "task", "both", "value")


class _SigmoidStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(u)
        ctx.width = width
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        s = torch.sigmoid(u / ctx.width)
        return gradient * s * (1 - s) / ctx.width, None


def sigmoid_step(width: float) -> Step:
    """u -> 1[u > 0], with the derivative of sigmoid(u / width), that is s (1 - s) / width, in the backward pass.

    Raises ValueError for a width that is not positive.
    """
    if not width > 0:
        raise ValueError(f"width is {width}; the surrogate needs a positive one, 0.2 for inputs of size 1")
    return lambda u: _SigmoidStep.apply(u, width)


class _Gate(torch.autograd.Function):
    """(x (N, C), theta (C,)) -> (y (N, C), rate (C,)) with the sigmoid surrogate, in one pass each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta_C: Tensor, width: Tensor, two_sided: bool, mode: str) -> Any:
        size = x.abs() if two_sided else x
        passed = size > theta_C
        ctx.save_for_backward(x, size, passed, theta_C, width)
        ctx.mode = mode
        return x * passed, passed.sum(0).to(x.dtype) / len(x)

    @staticmethod
    def backward(ctx: Any, to_y: Tensor, to_rate_C: Tensor) -> Any:
        x, size, passed, theta_C, width = ctx.saved_tensors
        to_theta_C = None
        if ctx.needs_input_grad[1]:
            s = torch.sigmoid((size - theta_C).div_(width))
            slope = s.addcmul(s, s, value=-1)  # s (1 - s)
            to_theta_C = torch.zeros_like(theta_C)
            if ctx.mode != "task":
                to_theta_C -= slope.sum(0) * (to_rate_C / len(x))
            if ctx.mode != "count":
                lost = x * to_y  # what the loss gains, to first order, when x is kept
                if ctx.mode == "value":
                    lost = lost.addcmul_(lost, lost, value=-0.5 * len(x))
                to_theta_C -= slope.mul_(lost).sum(0)
            to_theta_C /= width
        return to_y * passed, to_theta_C, None, None, None


class EventThreshold(nn.Module):
    """Passes x where it exceeds its channel's threshold, else exactly 0; the thresholds can be learned.

    `theta_C` = max(floor, scale x softplus(raw)), float (C,), never negative. In eval mode the result is
    x * (|x| > theta_C), or x * (x > theta_C) one-sided. In training mode the values are the same, and

        d y / d x      1 where x passes, else 0
        d y / d theta  -x s'((|x| - theta) / scale) / scale     unless `theta_gradient` is "count"
        d rate / d theta  the mean over rows of -s'(...) / scale   unless `theta_gradient` is "task"

    with s' the surrogate's derivative. `rate_C` is the share of rows that pass, (C,), of the latest call in training
    mode; its gradient reaches theta, and x too with `count_to_input`.

    Args:
        channels: size C of the last axis. two_sided: False rectifies as well.
        initial: thresholds at the start, in units of `scale`; 0 stays there: the gate then only counts, and
            rectifies where one-sided.
        scale: size of a typical input; thresholds and the surrogate's width count in it.
        width: of the default surrogate, in units of `scale`. step: another surrogate, such as
            `snntorch.surrogate.fast_sigmoid()`.
        theta_gradient: "count": only the event count moves theta; "task": only the loss does; "both"; "value": both, with
            the second-order term of what dropping x costs, N (x dL/dy)^2 / 2 for a loss that is a mean over the N rows
            (empirical Fisher for the curvature, as in Optimal Brain Damage). Near an optimum the first-order term
            is 0 on average whatever x is worth, so that "both" sees a loss only after the damage.
        shared: one threshold for all channels, as a population of graded neurons has.

    Raises:
        ValueError: a size, scale, threshold or word out of range, or an input of another width.
    """

    raw: Tensor
    scale: Tensor
    floor: Tensor

    def __init__(
        self,
        channels: int,
        *,
        two_sided: bool = True,
        initial: float = 0.05,
        scale: float = 1.0,
        width: float = 0.2,
        step: Step | None = None,
        theta_gradient: str = "both",
        count_to_input: bool = False,
        shared: bool = False,
    ) -> None:
        super().__init__()
        if channels < 1 or not scale > 0 or initial < 0:
            raise ValueError(
                f"channels is {channels}, scale {scale}, initial {initial}: at least 1, positive, and not negative"
            )
        if theta_gradient == "value" and (step is not None or count_to_input):
            raise ValueError("theta_gradient 'value' needs the default surrogate and no count_to_input")
        if theta_gradient not in GRADIENTS:
            raise ValueError(f"theta_gradient is {quoted(theta_gradient)}; one of {', '.join(GRADIENTS)}")
        self.channels = channels
        self.two_sided = two_sided
        self.theta_gradient = theta_gradient
        self.count_to_input = count_to_input
        self.shared = shared
        self.width = width
        self.step: Step = step if step is not None else sigmoid_step(width)
        self._fused = step is None and not count_to_input
        self.rate_C: Tensor | None = None
        raw = torch.full((1 if shared else channels,), _inverse_softplus(initial))
        self.raw = nn.Parameter(raw, requires_grad=initial > 0)
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("floor", torch.tensor(0.0))

    @property
    def theta_C(self) -> Tensor:
        """Thresholds in the input's own unit, (C,), with a gradient to `raw`."""
        theta = torch.maximum(self.scale * F.softplus(self.raw), self.floor)
        return theta.expand(self.channels)

    @torch.no_grad()
    def set_theta(self, theta_C: Tensor) -> None:
        """Take thresholds (C,), or (1,) where shared, in the input's own unit.

        Raises ValueError for another shape, or for negative or non-finite values.
        """
        if theta_C.shape != self.raw.shape:
            raise ValueError(f"theta has shape {tuple(theta_C.shape)}; this threshold holds {tuple(self.raw.shape)}")
        if not bool(torch.isfinite(theta_C).all()) or bool((theta_C < 0).any()):
            raise ValueError("theta has negative or non-finite values; a threshold is 0 or above")
        u = (theta_C / self.scale).double()
        self.raw.copy_(torch.where(u > 0, u + torch.log(-torch.expm1(-u)), torch.full_like(u, -math.inf)))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.channels:
            raise ValueError(f"the input has {x.shape[-1]} channels, this threshold {self.channels}")
        theta_C = self.theta_C.to(x.dtype)
        if not (self.training and torch.is_grad_enabled()):
            return x * ((x.abs() if self.two_sided else x) > theta_C)
        if self._fused:
            width, rows = self.width * self.scale, x.reshape(-1, self.channels)  # a tensor: compilers follow it
            y, self.rate_C = _Gate.apply(rows, theta_C, width, self.two_sided, self.theta_gradient)
            return y.view(x.shape)
        size = (x.abs() if self.two_sided else x) / self.scale
        level_C = theta_C / self.scale
        task_C = level_C.detach() if self.theta_gradient == "count" else level_C
        count_C = level_C.detach() if self.theta_gradient == "task" else level_C
        mask = self.step(size.detach() - task_C)
        passed = mask
        if self.count_to_input or task_C is not count_C:
            passed = self.step((size if self.count_to_input else size.detach()) - count_C)
        self.rate_C = passed.reshape(-1, self.channels).mean(0)
        return x * mask

    def __getstate__(self) -> dict[str, Any]:
        """Without the latest call's `rate_C`: it hangs on a graph, which cannot be copied."""
        return {**self.__dict__, "rate_C": None}

    def extra_repr(self) -> str:
        kind = "two-sided" if self.two_sided else "one-sided"
        return f"{self.channels}, {kind}, mean theta {float(self.theta_C.detach().mean()):.4g}"


def _inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value)) if value > 0 else -math.inf
