"""What a module keeps from call to call: put back after a look at it, and copied without the graph that made it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

Restore = Callable[[], None]
WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)


@contextmanager
def state_kept(module: nn.Module) -> Iterator[None]:
    """Afterwards every module has the attributes, buffers and training flags it had before, their values included.

    That covers membranes and caches that a forward pass writes, whether they are buffers, plain attributes, or tensors in
    lists and dicts of one. Parameters and hooks are left alone.
    """
    undo = [_noted(part) for part in module.modules()]
    try:
        yield
    finally:
        for restore in undo:
            restore()


def detached_copy(module: nn.Module) -> nn.Module:
    """A deep copy; tensors that hang on an autograd graph (membranes after training) are copied without it."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in [*vars(part).values(), *part._buffers.values()]:
            for tensor in _tensors(value):
                if tensor.grad_fn is not None:
                    memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(module, memo)


def weight_hooks(layer: nn.Module) -> list[Callable[[nn.Module, Any], None]]:
    """The hooks of torch.nn.utils that compute an nn.Linear's weight or bias before each call; none for other layers."""
    if type(layer) is not nn.Linear:
        return []
    return [hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, WEIGHT_HOOKS)]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (list, tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


_OWN = ("_parameters", "_buffers", "_modules")


def _noted(part: nn.Module) -> Restore:
    attributes = dict(vars(part))
    buffers = dict(part._buffers)
    values = [_value(value) for key, value in attributes.items() if key not in _OWN and "hook" not in key]
    values += [_value(value) for value in buffers.values()]

    def restore() -> None:
        for key in vars(part).keys() - attributes.keys():
            del vars(part)[key]
        vars(part).update(attributes)
        part._buffers.clear()
        part._buffers.update(buffers)
        for back in values:
            back()

    return restore


def _value(value: Any) -> Restore:
    """Puts back what a tensor, list or dict held; nothing for other objects."""
    if isinstance(value, Tensor):
        held, version = value.detach().clone(), None if value.is_inference() else value._version

        def tensor() -> None:
            if version is None or value._version != version:
                with torch.no_grad():
                    value.copy_(held)

        return tensor
    if type(value) is list:
        items, each = list(value), [_value(item) for item in value]

        def listed() -> None:
            value[:] = items
            for back in each:
                back()

        return listed
    if isinstance(value, dict):
        pairs, each = dict(value), [_value(item) for item in value.values()]

        def mapped() -> None:
            value.clear()
            value.update(pairs)
            for back in each:
                back()

        return mapped
    if type(value) is tuple:
        each = [_value(item) for item in value]

        def fixed() -> None:
            for back in each:
                back()

        return fixed
    return lambda: None
