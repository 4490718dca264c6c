"""What happens at each operation of a watched forward: it runs as it is, and hands labels on."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_update.library.tracking.flops import Count
from sparse_update.library.tracking.labels import NONE, Streams
from sparse_update.library.tracking.mixing import Mixing
from sparse_update.library.tracking.rules import Label, labels_of


class Watched(Protocol):
    """What is known of the forward, as `trace.Trace` holds it."""

    streams: list[Streams]
    labels: list[WeakTensorKeyDictionary]
    fixed: WeakTensorKeyDictionary
    count: Count
    mixing: Mixing
    forwards: int


class Mode(TorchDispatchMode):
    """Runs every operation as it is and hands labels on."""

    supports_higher_order_operators = True

    def __init__(self, trace: Watched) -> None:
        super().__init__()
        self.trace = trace

    @torch.compiler.disable
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        trace = self.trace
        given, fixed = _first_level(args, kwargs), trace.fixed.__contains__
        before = [[_get(labels, a) for a in given] for labels in trace.labels]
        alike = _is_fixed(func, given, trace.fixed)
        out = func(*args, **kwargs)
        outs = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, (tuple, list)) else []
        trace.count.add(func, args, kwargs, out, trace.forwards)
        if any(isinstance(t, Tensor) and t.is_nested for t in (*given, *outs)):
            return out
        for labels, streams, olds in zip(trace.labels, trace.streams, before, strict=True):
            known = {id(a): old for a, old in zip(_first_level(args, kwargs), olds, strict=True)}

            def of(x: Any, known: Any = known, labels: Any = labels) -> Label:
                return known[id(x)] if id(x) in known else _get(labels, x)

            found = labels_of(func, args, kwargs, out, of, streams, fixed)
            for tensor, label in zip(outs, [found] if isinstance(out, Tensor) else found or [], strict=False):
                _put(labels, tensor, label, args and tensor is args[0])
        for tensor in outs:
            _mark(trace.fixed, tensor, alike)
        by_place = all(t in trace.fixed or t.is_floating_point() for t in given)
        trace.mixing.follow(func, given, outs, trace.labels[0].get, by_place)
        return out


def _is_fixed(func: Any, given: list[Tensor], fixed: WeakTensorKeyDictionary) -> bool:
    """Whether what `func` gives is the same for all inputs: made of fixed tensors or of none, and not drawn."""
    return torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()) and all(t in fixed for t in given)


def _mark(fixed: WeakTensorKeyDictionary, tensor: Any, alike: bool) -> None:
    if not isinstance(tensor, Tensor):
        return
    if alike:
        fixed[tensor] = True
        return
    for written in (tensor, tensor._base):
        if written is not None and written in fixed and (written is tensor or tensor._is_view()):
            del fixed[written]


def _get(labels: WeakTensorKeyDictionary, x: Any) -> Label:
    return labels.get(x) if isinstance(x, Tensor) else None


def _put(labels: WeakTensorKeyDictionary, tensor: Any, label: Label, written: bool) -> None:
    """`written`: in place, so that the tensor it is a view of changes too."""
    if not isinstance(tensor, Tensor):
        return
    if label is None or label.shape != tensor.shape:
        if tensor in labels:
            del labels[tensor]
        return
    labels[tensor] = label
    base = tensor._base
    if written and base is not None and base.is_contiguous() and tensor.numel() < base.numel():
        old = labels.get(base)
        whole = torch.full(base.shape, NONE, dtype=torch.int32, device=base.device) if old is None else old.contiguous()
        whole = whole.clone()
        whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - base.storage_offset()).copy_(label)
        labels[base] = whole


def _first_level(args: Any, kwargs: Any) -> list[Tensor]:
    found = []
    for a in (*args, *kwargs.values()):
        found += (
            [a]
            if isinstance(a, Tensor)
            else [b for b in a if isinstance(b, Tensor)]
            if isinstance(a, (list, tuple))
            else []
        )
    return found
