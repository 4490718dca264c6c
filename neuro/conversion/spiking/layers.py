"""Layers of torch that lie between neurons, as one group of synapses: convolutions stay convolutions.

A way from neurons to neurons is a list of linear layers. One convolution stays one; an average pool alone is a convolution
of each channel for itself; a pool before or behind a convolution is folded into its kernel where the borders allow it.
Everything else is multiplied out to a matrix, whose zeros a sparse projection does not store. Biases are what zeros become.

Shape letters: C channels, H, W positions, L length, N neurons, F inputs.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hardware.text import quoted
from neuro.conversion.spiking.description import NotConvertible, Synapses
from neuro.graph.synapses import Convolution

LARGEST_MATRIX = 2**26  # weights of a group multiplied out


@dataclass(frozen=True, eq=False)
class _Conv:
    weight: Tensor  # (O, I / groups, kH, kW)
    bias: Tensor | None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    pool: bool = False  # whether it is an average pool

    def __call__(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@dataclass(frozen=True, eq=False)
class _Linear:
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class _Flatten:
    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(C, H, W) as a layer's shape (W, H, C); (N,) as it is."""
    return (shape[2], shape[1], shape[0]) if len(shape) == 3 else shape


@dataclass
class Path:
    """Linear layers behind a source, the input or neurons; `shape` is (N,) or (C, H, W) behind the last of them."""

    source: str
    shape: tuple[int, ...]
    names: tuple[str, ...] = ()  # of the layers
    _steps: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.shape) == 2:  # (C, L)
            self.shape = (self.shape[0], 1, self.shape[1])
        if len(self.shape) not in (1, 3) or min(self.shape) < 1:
            raise NotConvertible(f"{self.source} has shape {self.shape}; (F,), (C, L) or (C, H, W) is needed")
        self._from = self.shape

    @property
    def start(self) -> tuple[int, ...]:
        """Shape of the source in a layer's order: (N,) or (W, H, C)."""
        return torch_shape(self._from)

    @property
    def waiting(self) -> str:
        """Name of the last layer, "" where there is none."""
        return self.names[-1] if self.names else ""

    def then(self, name: str, module: nn.Module, *, bias: bool = True) -> Path:
        """A way with one more layer, with or without its bias; this one stays as it is."""
        longer = copy(self)
        longer._steps = list(self._steps)
        longer.add(name, module, bias=bias)
        return longer

    def add(self, name: str, module: nn.Module, *, bias: bool = True) -> None:
        """One more layer; NotConvertible names what does not fit or has no counterpart."""
        step = self._step(name, module)
        if step is None:
            self.names += (name,)
            return
        if not bias and isinstance(step, _Conv | _Linear):
            step = replace(step, bias=None)
        try:
            shape = tuple(step(torch.zeros(1, *self.shape, dtype=torch.float64)).shape[1:])
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise NotConvertible(
                f"{name} ({type(module).__name__}) does not fit what reaches it, {self.shape}: {reason}"
            ) from error
        self._steps.append(step)
        self.shape = shape
        self.names += (name,)

    def _step(self, name: str, module: Any) -> Any:
        kind = type(module).__name__

        def value(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().cpu().double()

        if kind == "Linear":
            if len(self.shape) != 1:
                raise NotConvertible(f"{name} (Linear) is reached by a grid {self.shape}; put nn.Flatten() before it")
            return _Linear(module.weight.detach().cpu().double(), value(module.bias))
        if kind in ("Conv1d", "Conv2d"):
            if module.padding_mode != "zeros":
                raise NotConvertible(f"{name} ({kind}): padding_mode is {quoted(module.padding_mode)}; zeros convert")
            padding = module.padding
            if isinstance(padding, str):
                reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
                if padding == "same" and any(n % 2 for n in reach):
                    raise NotConvertible(f"{name} ({kind}): padding='same' of an even kernel is uneven; give numbers")
                padding = tuple(n // 2 if padding == "same" else 0 for n in reach)
            weight = module.weight.detach().cpu().double()
            flat = kind == "Conv1d"
            return _Conv(
                weight[:, :, None] if flat else weight,
                value(module.bias),
                _pair(module.stride, flat, 1),
                _pair(padding, flat, 0),
                _pair(module.dilation, flat, 1),
                int(module.groups),
            )
        if kind in ("AvgPool1d", "AvgPool2d"):
            return self._pool(name, module, kind == "AvgPool1d")
        if kind in ("BatchNorm1d", "BatchNorm2d"):
            return self._norm(name, module)
        if kind == "Flatten":
            if (module.start_dim, module.end_dim) != (1, -1):
                raise NotConvertible(f"{name} (Flatten): dims {module.start_dim}..{module.end_dim}; 1..-1 converts")
            return _Flatten() if len(self.shape) == 3 else None
        raise NotConvertible(
            f"{name} ({kind}) has no counterpart between spiking layers. Linear, Conv1d, Conv2d, AvgPool, BatchNorm and"
            f" Flatten convert{'; use an average pool' if 'MaxPool' in kind else ''}"
        )

    def _pool(self, name: str, module: Any, flat: bool) -> Any:
        if len(self.shape) != 3:
            raise NotConvertible(f"{name} ({type(module).__name__}) is reached by {self.shape}; it pools grids")
        kernel, stride = (_pair(v, flat, 1) for v in (module.kernel_size, module.stride))
        padding = _pair(module.padding, flat, 0)
        if module.ceil_mode or (any(padding) and not module.count_include_pad) or getattr(module, "divisor_override", None):
            raise NotConvertible(
                f"{name} ({type(module).__name__}): ceil_mode, count_include_pad=False and divisor_override divide by"
                " different numbers at borders; leave them at their defaults"
            )
        weight = torch.full((self.shape[0], 1, *kernel), 1 / math.prod(kernel), dtype=torch.float64)
        return _Conv(weight, None, stride, padding, groups=self.shape[0], pool=True)

    def _norm(self, name: str, module: Any) -> None:
        before = self._steps[-1] if self._steps else None
        if not isinstance(before, _Conv | _Linear) or module.running_var is None:
            raise NotConvertible(f"{name} ({type(module).__name__}): it folds into a Linear or convolution right before it")
        scale = 1 / torch.sqrt(module.running_var.detach().cpu().double() + module.eps)
        if module.weight is not None:
            scale = scale * module.weight.detach().cpu().double()
        shift = -module.running_mean.detach().cpu().double() * scale
        if module.bias is not None:
            shift = shift + module.bias.detach().cpu().double()
        bias = shift if before.bias is None else before.bias * scale + shift
        weight = before.weight * scale.reshape(-1, *[1] * (before.weight.ndim - 1))
        if isinstance(before, _Conv):
            self._steps[-1] = replace(before, weight=weight, bias=bias, pool=False)
        else:
            self._steps[-1] = _Linear(weight, bias)

    def synapses(self, name: str, target: str) -> tuple[Synapses, np.ndarray]:
        """The group of synapses that this way is, and the bias (N,) that comes with it."""
        zeros = torch.zeros(1, *self._from, dtype=torch.float64)
        bias_N = _ordered(self._through(zeros)).reshape(-1).numpy()
        convs = [step for step in self._steps if isinstance(step, _Conv)]
        if convs and len(convs) == len(self._steps):
            single = _as_one(convs, self._from)
            if single is not None:
                return _conv_synapses(name, self.source, target, single, self.start), bias_N
        return Synapses(name, self.source, target, self._matrix(name)), bias_N

    def _through(self, x: Tensor) -> Tensor:
        for step in self._steps:
            x = step(x)
        return x

    def _matrix(self, name: str) -> np.ndarray:
        size, out = math.prod(self._from), math.prod(self.shape)
        if size * out > LARGEST_MATRIX:
            raise NotConvertible(
                f"{name}: {self.waiting} and what lies before it have {size * out:,} weights as a matrix;"
                f" {LARGEST_MATRIX:,} are the limit. Put neurons between them"
            )
        if len(self._steps) == 1 and isinstance(self._steps[0], _Linear):
            return self._steps[0].weight.numpy()
        zero = self._through(torch.zeros(1, *self._from, dtype=torch.float64))
        columns = []
        chunk = max(1, 2**24 // max(size, out))
        eye = torch.arange(size)
        for first in range(0, size, chunk):
            rows = eye[first : first + chunk]
            unit = torch.zeros(len(rows), size, dtype=torch.float64)
            unit[torch.arange(len(rows)), rows] = 1
            columns.append(_ordered(self._through(unit.reshape(-1, *self._from)) - zero))
        matrix_SN = torch.cat(columns)  # sources in torch's order
        if len(self._from) == 3:
            order = torch.arange(size).reshape(self._from).permute(2, 1, 0).reshape(-1)
            matrix_SN = matrix_SN[order]
        return matrix_SN.T.numpy()


def _pair(value: Any, flat: bool, other: int) -> tuple[int, int]:
    """(along H, along W); of a one-dimensional layer (other, along L)."""
    numbers = tuple(int(v) for v in (value if isinstance(value, tuple | list) else (value,)))
    return (other, numbers[-1]) if flat else (numbers[0], numbers[-1])


def _ordered(x: Tensor) -> Tensor:
    """(B, C, H, W) or (B, N) as (B, N) in a layer's order."""
    return (x.permute(0, 3, 2, 1) if x.ndim == 4 else x).reshape(len(x), -1)


def _conv_synapses(name: str, source: str, target: str, conv: _Conv, start: tuple[int, ...]) -> Synapses:
    weight = conv.weight.flip(2, 3).permute(0, 3, 2, 1).numpy()
    geometry = Convolution(
        (start[0], start[1], start[2]), conv.stride[::-1], conv.padding[::-1], conv.dilation[::-1], conv.groups
    )
    return Synapses(name, source, target, weight, geometry)


def _as_one(convs: list[_Conv], shape: tuple[int, ...]) -> _Conv | None:
    """Convolutions that follow each other as one, where all but one are pools that fold; else None."""
    first, *rest = convs
    for after in rest:
        whole = _pool_first(first, after, shape) if first.pool else _pool_last(first, after) if after.pool else None
        if whole is None:
            return None
        first = whole
    return first


def _pool_first(pool: _Conv, conv: _Conv, shape: tuple[int, ...]) -> _Conv | None:
    """A pool and the convolution behind it as one convolution; None where borders differ."""
    if conv.dilation != (1, 1) or any(pool.padding):
        return None
    kernel = tuple(pool.weight.shape[2:])
    whole = all((n - k) % s == 0 for n, s, k in zip(shape[1:], pool.stride, kernel, strict=True))
    if any(conv.padding) and not (whole and pool.stride == kernel):
        return None
    # Each weight spread over the places that it pools: a transposed convolution of the kernel with the pool's.
    rows = conv.weight.reshape(-1, 1, *conv.weight.shape[2:])
    spread = functional.conv_transpose2d(rows, pool.weight[:1], stride=pool.stride)
    return _Conv(
        spread.reshape(*conv.weight.shape[:2], *spread.shape[2:]),
        conv.bias,
        (pool.stride[0] * conv.stride[0], pool.stride[1] * conv.stride[1]),
        (pool.stride[0] * conv.padding[0], pool.stride[1] * conv.padding[1]),
        groups=conv.groups,
        pool=conv.pool,
    )


def _pool_last(conv: _Conv, pool: _Conv) -> _Conv | None:
    """A convolution and the pool of its output as one convolution; None where the pool has a border."""
    if conv.dilation != (1, 1) or any(pool.padding):
        return None
    rows = conv.weight.reshape(1, -1, *conv.weight.shape[2:])
    spread = functional.conv_transpose2d(pool.weight[:1], rows, stride=conv.stride)
    weight = spread.reshape(*conv.weight.shape[:2], *spread.shape[2:])
    stride = (conv.stride[0] * pool.stride[0], conv.stride[1] * pool.stride[1])
    return replace(conv, weight=weight, stride=stride)
