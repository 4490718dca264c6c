"""Small jobs on memory that a run does between its loops. On the CPU numpy does them, on the calling thread.

torch would hand them to its OpenMP threads, which go on spinning for a while when they are done, on the processors that the
threads of `neuro.simulators.compiled` want next.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_TYPES = {torch.int8: np.int8, torch.int32: np.int32}


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """int8 or int32, all 0."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(shape, dtype=_TYPES[dtype]))
    return torch.zeros(shape, dtype=dtype, device=device)


def unwritten(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """int8 or int32, not yet written. On the CPU by numpy, which asks the system for large pages for a large array."""
    if device.type == "cpu":
        return torch.from_numpy(np.empty(shape, dtype=_TYPES[dtype]))
    return torch.empty(shape, dtype=dtype, device=device)


def filled(size: int, value: int, device: torch.device) -> Tensor:
    """int32 (size,), all `value`."""
    if device.type == "cpu":
        return torch.from_numpy(np.full(size, value, dtype=np.int32))
    return torch.full((size,), value, dtype=torch.int32, device=device)


def copied(value: Tensor) -> Tensor:
    """A copy without gaps."""
    return torch.from_numpy(value.numpy().copy()) if value.device.type == "cpu" else value.clone()


def write(to: Tensor, value: Tensor) -> None:
    """Copy onto a tensor of the same shape and type."""
    if to.device.type == "cpu":
        to.numpy()[...] = value.numpy()
    else:
        to.copy_(value)


def edges(value: Tensor) -> tuple[int, int]:
    """The lowest and the highest of integers."""
    if value.device.type == "cpu":
        array = value.numpy()
        return int(array.min()), int(array.max())
    least, most = torch.aminmax(value)
    return int(least), int(most)
