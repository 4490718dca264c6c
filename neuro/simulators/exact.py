"""Integer arithmetic carried out in floating point where that is proven exact, and in integers elsewhere.

A matrix product of integers has no rounding in floating point as long as no partial sum can reach 2^24 (float32) or
2^53 (float64), in whatever order it is summed; the row sums of |weight| times the largest message bound them. The
bound is a measured one, taken from the messages at hand, so that it is tight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuro.graph import Projection

FLOAT32_EXACT = 2**24
FLOAT64_EXACT = 2**53
INT32_LIMIT = 2**31


@dataclass(frozen=True)
class Exact:
    """Integers in a floating-point tensor, with a proven bound on their magnitude: float32 below 2^24, else float64."""

    value: Tensor
    bound: int


Arrived = tuple[Exact, Tensor | None]  # sums at a port, and a mask of those that wrapped (None: none can have)


def fitting(bound: int) -> torch.dtype:
    """The narrowest floating-point type that holds every integer up to `bound`."""
    return torch.float32 if bound < FLOAT32_EXACT else torch.float64


def float32_products_are_exact(device: torch.device) -> bool:
    """Whether float32 matrix products keep 24 bits here: torch may have been allowed TF32 (GPU) or bf16 (CPU)."""
    backends: Any = torch.backends  # torch gives these attributes no type
    setting = (backends.cuda if device.type == "cuda" else backends.mkldnn).matmul.fp32_precision
    if setting == "none":  # not set for this operation: the general setting holds
        setting = backends.fp32_precision
    return setting in ("none", "ieee")


def wrap_int32(value: Tensor) -> Tensor:
    """Two's-complement wrap to 32 bits of integers held in float64 (below 2^53 in magnitude)."""
    return value - torch.floor((value + INT32_LIMIT) * 2.0**-32) * 2.0**32


class Synapses:
    """Weights of one projection on a device, ready for exact products."""

    def __init__(self, projection: Projection, device: torch.device) -> None:
        self.projection = projection
        self.binary = projection.num_message_bits == 0
        self._weight_TS = torch.from_numpy(projection.weight.copy()).to(device)  # T targets, S sources
        self._row_sum = int(self._weight_TS.abs().sum(dim=1, dtype=torch.int64).max())
        self._cast: dict[torch.dtype, Tensor] = {}

    def _weight(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._cast:
            self._cast[dtype] = self._weight_TS.t().to(dtype).contiguous()
        return self._cast[dtype]

    def sums(self, messages: Exact) -> Arrived:
        """`(W s) << weight_exp` of messages (..., S).

        Returns:
            the sums (..., T), and a mask (..., T) of those that left 32 bits and were wrapped on the way, or None when
            the bound rules that out.
        """
        value, bound = messages.value, messages.bound
        if self.binary and bound > 1:
            value, bound = (value != 0).to(torch.float32), 1
        limit = bound * self._row_sum
        exponent = self.projection.weight_exp
        dtype = fitting(limit)
        if dtype == torch.float32 and not float32_products_are_exact(value.device):
            dtype = torch.float64
        wrapped: Tensor | None = None
        if limit < FLOAT64_EXACT:
            accumulated = value.to(dtype) @ self._weight(dtype)
        else:  # two exact halves: below 2^16 x the row sum each; the upper half counts modulo 2^32
            high = torch.floor(value.to(torch.float64) * 2.0**-16)
            low = value.to(torch.float64) - high * 2.0**16
            weight = self._weight(torch.float64)
            upper, lower = high @ weight, low @ weight
            accumulated = upper * 2.0**16 + lower
            wrapped = _outside(accumulated)
            accumulated = wrap_int32(wrap_int32(upper) * 2.0**16 + lower)
            limit = INT32_LIMIT
        if limit >= INT32_LIMIT and wrapped is None:
            wrapped = _outside(accumulated)
            accumulated, limit = wrap_int32(accumulated), INT32_LIMIT
        if exponent > 0:
            limit <<= exponent
            accumulated = accumulated.to(fitting(limit)) * 2.0**exponent
            if limit >= INT32_LIMIT:
                wrapped = _outside(accumulated) if wrapped is None else wrapped | _outside(accumulated)
                accumulated, limit = wrap_int32(accumulated), INT32_LIMIT
        elif exponent < 0:
            accumulated = accumulated.mul_(2.0**exponent).floor_()
            limit = -(-limit >> -exponent)
        return Exact(accumulated.to(fitting(limit)), limit), wrapped


def _outside(value: Tensor) -> Tensor:
    return (value >= INT32_LIMIT) | (value < -INT32_LIMIT)


def add(parts: list[Arrived]) -> Arrived:
    """Sum of what several projections deliver to one port, wrapped to 32 bits where it can leave them."""
    total, wrapped = parts[0]
    for part, mask in parts[1:]:
        bound = total.bound + part.bound
        dtype = fitting(bound)
        value = total.value.to(dtype) + part.value.to(dtype)
        wrapped = mask if wrapped is None else wrapped if mask is None else wrapped | mask
        if bound >= INT32_LIMIT:
            wrapped = _outside(value) if wrapped is None else wrapped | _outside(value)
            value, bound = wrap_int32(value), INT32_LIMIT
        total = Exact(value, bound)
    return total, wrapped


def join(masks: list[Tensor | None]) -> Tensor | None:
    """Masks of consecutive steps as one; where one is missing, nothing was marked."""
    present = next((mask for mask in masks if mask is not None), None)
    if present is None:
        return None
    return torch.cat([torch.zeros_like(present) if mask is None else mask for mask in masks])


def join_arrived(parts: list[Arrived]) -> Arrived:
    """Sums of consecutive steps as one."""
    bound = max(part.bound for part, _ in parts)
    value = torch.cat([part.value.to(fitting(bound)) for part, _ in parts])
    return Exact(value, bound), join([mask for _, mask in parts])
