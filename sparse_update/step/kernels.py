"""Runs functions of tensors eagerly, or compiled: one compilation for each static shape, shared by all layers and steps."""

from __future__ import annotations

import os
import shutil
import types
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

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
