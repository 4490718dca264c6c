"""Runs functions of tensors eagerly, or compiled: one compilation for each static shape, shared by all layers and steps.
Forms weight gradients at strips: by torch's products, or on a GPU with Triton in one launch for all strips of a matrix.

Shape letters: N token row, O output, I input.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import types
import warnings
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

Strip = tuple[int, int, int]
"""Dimension, start, stop."""
_COMPILED: dict[Hashable, Callable[..., Any]] = {}
"""Shared by all steppers of the process: compiled functions hold no weights."""


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs: a C++ compiler for CPU code, Triton for a GPU."""
    if device.type == "cuda":
        return bool(torch.utils._triton.has_triton())
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return any(shutil.which(name) for name in names if name)


class Kernels:
    """Calls functions, compiled where asked for. A compilation that fails is warned about once; then all runs eagerly."""

    def __init__(self, compiled: bool) -> None:
        self.compiled = compiled

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if not self.compiled:
            return function(*arguments)
        key = (function, *(_shape(a) for a in arguments))
        kernel = _COMPILED.get(key)
        if kernel is not None:
            return kernel(*arguments)
        # a copy of the code object: torch.compile counts recompilations per code object and gives up at eight
        copy = types.FunctionType(
            function.__code__.replace(co_name=f"{function.__name__}_{len(_COMPILED)}"), function.__globals__
        )
        kernel = torch.compile(copy, dynamic=False, fullgraph=True)
        try:
            found = kernel(*arguments)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            warnings.warn(f"torch.compile does not work here ({str(error).splitlines()[0]}): eager steps", stacklevel=3)
            self.compiled = False
            return function(*arguments)
        _COMPILED[key] = kernel
        return found


def _shape(argument: Any) -> Hashable:
    if isinstance(argument, Tensor):
        return argument.shape, argument.dtype, argument.device.type
    return argument


class StripProducts(Protocol):
    """g^T x at strips of rows or of columns: g (N, O), x (N, I) -> one (stop - start, I) or (O, stop - start) each."""

    def __call__(self, g_NO: Tensor, x_NI: Tensor, parts: tuple[Strip, ...]) -> tuple[Tensor, ...]: ...


def strip_products(g_NO: Tensor, x_NI: Tensor, parts: tuple[Strip, ...]) -> tuple[Tensor, ...]:
    """`StripProducts`; one product, narrowed, where the strips cover the matrix. Triton's on a GPU, where it is there."""
    if tiled(parts, g_NO.shape[1], x_NI.shape[1]):
        whole = g_NO.t() @ x_NI
        return tuple(whole.narrow(dim, start, stop - start) for dim, start, stop in parts)
    return strips_on(g_NO.device, g_NO.dtype)(g_NO, x_NI, parts)


def strips_on(device: torch.device, dtype: torch.dtype) -> StripProducts:
    """What forms strips on a device: Triton's on a GPU, which adds up in float32 and so leaves float64 to torch."""
    return (_by_triton() or by_torch) if device.type == "cuda" and dtype != torch.float64 else by_torch


def by_torch(g_NO: Tensor, x_NI: Tensor, parts: tuple[Strip, ...]) -> tuple[Tensor, ...]:
    """A product for each strip."""
    return tuple(
        g_NO[:, start:stop].t() @ x_NI if dim == 0 else g_NO.t() @ x_NI[:, start:stop] for dim, start, stop in parts
    )


@functools.cache
def _by_triton() -> StripProducts | None:
    """Triton's, None where it is not installed. CUDA builds of torch bring it along."""
    if importlib.util.find_spec("triton") is None:
        return None
    from sparse_update.step.triton_strips import by_triton

    return by_triton


def tiled(parts: tuple[Strip, ...], height: int, width: int) -> bool:
    """Whether strips cover a (height, width) matrix whole."""
    return sum(stop - start for _, start, stop in parts) == (height, width)[parts[0][0]]
