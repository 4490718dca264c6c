"""What a module keeps from call to call: put back after a look at it, and copied without the graph that made it."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MemberDescriptorType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

Restore = Callable[[], None]
OBJECTS_DEEP = 2
"""How many objects, one within the other, are looked into for what a module keeps."""
WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)


class Account:
    """Base of what counts the calls of a deployed module: `state_kept` leaves it as the calls made it."""


@contextmanager
def state_kept(module: nn.Module) -> Iterator[None]:
    """Afterwards every module has the attributes, buffers and training flags it had before, their values included.

    That covers membranes and caches that a forward pass writes: buffers and plain attributes; tensors, NumPy arrays and
    torch generators in them; and what lists, dicts, sets, deques and objects (down to one within another) hold. Modules
    in a plain list are covered as are those that torch knows of. Parameters, hooks and an `Account` are left alone.
    """
    notes = _Notes()
    notes.value(module, OBJECTS_DEEP)
    try:
        yield
    finally:
        for restore in notes.undo:
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


def _tensors(value: Any, deep: int = OBJECTS_DEEP) -> Iterator[Tensor]:
    """Tensors in an attribute, found by the ways of `state_kept`; those of a module within it are the module's own."""
    if isinstance(value, Tensor):
        yield value
    elif not isinstance(value, nn.Module) and (deep := deep - _is_object(value)) >= 0:
        for item in _inside(value):
            yield from _tensors(item, deep)


_CONTAINERS = (list, tuple, set, frozenset, deque)
_VALUES = (Tensor, np.ndarray, torch.Generator, nn.Module, Account, type, str, bytes)
_TORCHS_OWN = frozenset(vars(nn.Module()))
_EMPTY = object()


class _Notes:
    """What modules and values held when they were noted; the calls of `undo` put all of it back."""

    def __init__(self) -> None:
        self.undo: list[Restore] = []
        self._seen: dict[int, Any] = {}  # the values too, so that none of their numbers is given out again

    def value(self, value: Any, deep: int) -> None:
        """A value and what it holds; `deep` objects, one within the other, are looked into."""
        deep -= _is_object(value)
        if deep < 0 or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, nn.Module):
            for part in value.modules():
                self._module(part)
            return
        if (note := _noted(value)) is not None:
            self.undo.append(note)
        for item in _inside(value):
            self.value(item, deep)

    def _module(self, part: nn.Module) -> None:
        """A module's own attributes and buffers; its children are noted apart."""
        self._seen[id(part)] = part
        attributes, buffers = dict(vars(part)), dict(part._buffers)

        def restore() -> None:
            for key in vars(part).keys() - attributes.keys():
                del vars(part)[key]
            vars(part).update(attributes)
            part._buffers.clear()
            part._buffers.update(buffers)

        self.undo.append(restore)
        for value in [*(value for key, value in attributes.items() if key not in _TORCHS_OWN), *buffers.values()]:
            self.value(value, OBJECTS_DEEP)


def _is_object(value: Any) -> bool:
    """Whether it is an instance of some class with attributes of its own, no container."""
    if isinstance(value, (dict, *_CONTAINERS, *_VALUES)):
        return False
    return type(getattr(value, "__dict__", None)) is dict or bool(_slots(value))


def _slots(value: Any) -> dict[str, MemberDescriptorType]:
    """The places that a class with `__slots__` has, by name; none of classes that are not written in Python."""
    kinds = [kind for kind in type(value).__mro__ if "__slots__" in vars(kind)]
    return {name: at for kind in kinds for name, at in vars(kind).items() if isinstance(at, MemberDescriptorType)}


def _inside(value: Any) -> list[Any]:
    """What a container or an object holds; nothing in everything else."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, _CONTAINERS):
        return list(value)
    if not _is_object(value):
        return []
    return [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in _slots(value))]


def _noted(value: Any) -> Restore | None:
    """Puts back what a value holds, not what lies within its items; None where it holds nothing that changes."""
    if isinstance(value, nn.Parameter):
        return None
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, np.ndarray):
        return _array(value)
    if isinstance(value, torch.Generator):
        return _generator(value)
    if isinstance(value, dict | list | set | deque):
        return _container(value)
    return _object(value) if _is_object(value) else None


def _tensor(value: Tensor) -> Restore:
    """Its values; of a plain tensor also shape and memory, which `resize_` and an assignment to `.data` change."""
    plain = type(value) is Tensor and value.layout is torch.strided and value.device.type != "meta"
    place, held, version = value.detach(), value.detach().clone(), None if value.is_inference() else value._version

    def restore() -> None:
        with torch.inference_mode() if value.is_inference() else torch.no_grad():
            if not plain:
                if version is None or value._version != version:
                    value.copy_(held)
                return
            if value.shape != held.shape or value.dtype != held.dtype or value.data_ptr() != place.data_ptr():
                value.data = place
            if not torch.equal(value, held):
                value.copy_(held)

    return restore


def _array(value: np.ndarray) -> Restore:
    held = value.copy()

    def restore() -> None:
        if value.flags.writeable:
            value[...] = held

    return restore


def _generator(value: torch.Generator) -> Restore:
    at = value.get_state()

    def restore() -> None:
        value.set_state(at)

    return restore


def _container(value: Any) -> Restore:
    held = dict(value) if isinstance(value, dict) else list(value)

    def restore() -> None:
        value.clear()
        value.extend(held) if isinstance(value, list | deque) else value.update(held)

    return restore


def _object(value: Any) -> Restore:
    attributes: dict[str, Any] | None = getattr(value, "__dict__", None)
    held = dict(attributes or {})
    slots = [(at, name, getattr(value, name, _EMPTY)) for name, at in _slots(value).items()]

    def restore() -> None:
        if attributes is not None:
            attributes.clear()
            attributes.update(held)
        for at, name, was in slots:
            if was is not _EMPTY:
                at.__set__(value, was)
            elif hasattr(value, name):
                at.__delete__(value)

    return restore
